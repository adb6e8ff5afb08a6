/** Tiny models as Hugging Face folders on the disk, with a tokenizer and text that fit their vocabulary of 41. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createShardedSink } from '../../formats/safetensors/sharded-writer.ts';
import { randomSource } from './random.ts';
import { type TinyModel, tinyLlama } from './tiny-models.ts';

const LETTERS = 'abcdefghijklmnopqrstuvwxyz0123456789';
const SPECIAL = ['<unk>', '<s>', '</s>'];
/** Byte-level spelling of the space and the line break. */
const VOCABULARY = [...SPECIAL, ...LETTERS, 'Ġ', 'Ċ'];

/** Byte-level BPE without merges: a token a character, `<s>` before every text. */
const TOKENIZER = {
  version: '1.0',
  truncation: null,
  padding: null,
  added_tokens: SPECIAL.map((content, id) => ({
    id,
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  })),
  normalizer: null,
  pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
  post_processor: {
    type: 'TemplateProcessing',
    single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
    pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
    special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
  },
  decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
  model: {
    type: 'BPE',
    dropout: null,
    unk_token: null,
    continuing_subword_prefix: null,
    end_of_word_suffix: null,
    fuse_unk: false,
    byte_fallback: false,
    ignore_merges: false,
    vocab: Object.fromEntries(VOCABULARY.map((token, id) => [token, id])),
    merges: [],
  },
};

/** The ids of a text of ours, by the definition of `TOKENIZER`. */
export function tokenIds(text: string): number[] {
  return [1, ...[...text].map((char) => VOCABULARY.indexOf(char === ' ' ? 'Ġ' : char === '\n' ? 'Ċ' : char))];
}

/** Random words of the tokenizer's characters. */
export function tinyText(characters: number, seed = 1): string {
  const random = randomSource(seed);
  const pick = () => {
    const place = Math.floor(random() * (LETTERS.length + 7));
    return place < LETTERS.length ? LETTERS[place] : place === LETTERS.length ? '\n' : ' ';
  };
  return Array.from({ length: characters }, pick).join('');
}

/** Hidden 64 and FFN 172: five groups of 32 and a short one in down_proj, two in every other layer. */
export function groupedLlama(label = 'e2e', changes: Readonly<Record<string, unknown>> = {}): TinyModel {
  const shape = { hidden_size: 64, intermediate_size: 172, num_attention_heads: 4, num_key_value_heads: 2 };
  return tinyLlama(label, { ...shape, ...changes });
}

/** Writes a model as Hugging Face does; more than one shard if `maxShardBytes` asks for it. Returns the folder. */
export async function saveCheckpoint(folder: string, tiny: TinyModel, maxShardBytes = 1e9): Promise<string> {
  mkdirSync(folder, { recursive: true });
  const tensors = [...tiny.source.tensors.values()];
  await using sink = await createShardedSink(
    folder,
    tensors.map(({ name, dtype, shape }) => ({ name, dtype, shape })),
    { maxShardBytes },
  );
  for (const { name, data } of tensors) await sink.write(name, data);
  await sink.finalize();
  const write = (name: string, value: unknown) => writeFileSync(join(folder, name), JSON.stringify(value));
  write('config.json', { ...tiny.config, bos_token_id: 1, eos_token_id: 2 });
  write('tokenizer.json', TOKENIZER);
  write('tokenizer_config.json', { tokenizer_class: 'PreTrainedTokenizerFast', bos_token: '<s>', eos_token: '</s>' });
  return folder;
}
