/** Every architecture pcomp knows, by its name in config.json, and the way from a configuration to a Model. */
import type { TensorSource } from '../../../formats/tensor.ts';
import { FormatError, UnsupportedError } from '../../errors.ts';
import { ConfigReader } from '../config.ts';
import { DecoderModel } from '../decoder-model.ts';
import type { DecoderDescription } from '../description.ts';
import type { Model } from '../model.ts';
import { describeGpt2 } from './gpt2.ts';
import { describeLlama, LLAMA_FAMILY } from './llama.ts';

type Describe = (config: ConfigReader, source: TensorSource) => DecoderDescription;

/** Turns a configuration into a description, by architecture. */
export const ARCHITECTURES: Readonly<Record<string, Describe>> = {
  ...Object.fromEntries(
    Object.entries(LLAMA_FAMILY).map(([name, traits]): [string, Describe] => [name, (config) => describeLlama(config, traits)]),
  ),
  GPT2LMHeadModel: describeGpt2,
};

/**
 * Makes a Model of a parsed config.json and the checkpoint's headers; reads no weights. Throws FormatError when a field
 * is missing or breaks a rule, or a tensor is missing or of another shape; UnsupportedError when pcomp cannot run it.
 */
export function createModel(config: unknown, configPath: string, source: TensorSource): Model {
  const reader = new ConfigReader(config, configPath);
  const [architecture] = reader.texts('architectures');
  if (architecture === undefined) {
    throw new FormatError(configPath, 'config-field-value', '"architectures" is empty, it must name one architecture');
  }
  if (!Object.hasOwn(ARCHITECTURES, architecture)) {
    const supported = Object.keys(ARCHITECTURES).join(', ');
    throw new UnsupportedError(`${configPath}: architecture "${architecture}" is not supported; supported: ${supported}`);
  }
  if (reader.has('quantization_config')) {
    throw reader.unsupported('quantization_config', 'the checkpoint is quantized already; give pcomp the original float weights');
  }
  return new DecoderModel(architecture, reader.fields, ARCHITECTURES[architecture](reader, source), source);
}
