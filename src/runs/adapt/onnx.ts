/** `adapt convert --to onnx`: an artifact that runs with an adapter, its factors in the file or given by the caller run by run. */
import { copyFile, mkdir } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { openOnnx } from '../../../formats/onnx/reader.ts';
import { writeOnnx } from '../../../formats/onnx/writer.ts';
import { type AdapterContents, readAdapterFolder } from '../../artifacts/adapter-reader.ts';
import { copyModelFiles } from '../../artifacts/copied-files.ts';
import { FOLDS_FILE } from '../../artifacts/folds-file.ts';
import { writeJson } from '../../artifacts/manifest.ts';
import { assertNaturalOrder, openModelSource } from '../../artifacts/model-source.ts';
import { type AdapterFeed, type AttachedAs, attachAdapter, feedsOf } from '../../artifacts/onnx/attach-adapter.ts';
import { attachRouted } from '../../artifacts/onnx/attach-routed.ts';
import { errorCode } from '../../artifacts/process-lock.ts';
import { RecipeError, UnsupportedError } from '../../errors.ts';

/** Files of an artifact that tell runtimes about it, whatever its weights. */
const KEPT = ['generation_config.json', 'genai_config.json', FOLDS_FILE];

/**
 * Writes the ONNX artifact `base` with the adapter's branches into `folder`. Throws RecipeError for a base that is no ONNX artifact or does not fit,
 * UnsupportedError for what plain factors cannot say.
 */
export async function writeWithAdapter(base: string, contents: AdapterContents, folder: string, as: AttachedAs): Promise<void> {
  await using source = await openModelSource(base);
  assertNaturalOrder(source, '--base');
  const { onnxPath } = source;
  if (onnxPath === undefined)
    throw new RecipeError(
      `--base ${base}: is no ONNX artifact (${source.kind}); quantize it with --format onnx, or fold the adapter in with --to merged`,
    );
  if (contents.saved.length > 0)
    throw new UnsupportedError(
      `--base ${base}: the adapter replaces "${contents.saved[0].name}" as a whole, which a branch cannot`,
    );
  const turned = contents.modules.find(({ magnitude }) => magnitude !== undefined);
  if (turned) throw new UnsupportedError(`"${turned.name}" is a DoRA, which a branch cannot say; --to merged folds it in`);
  const { routed, deltas } = contents;
  if (deltas.length > 0 || (routed.length > 0 && as === 'inputs'))
    throw new UnsupportedError(
      `--base ${base}: the adapter (${contents.layout}) ${deltas.length > 0 ? 'changes single weights, which a branch cannot; --to merged folds it in' : 'routes tokens through experts, which are constants of the file: --to onnx'}`,
    );
  await using file = await openOnnx(onnxPath);
  const model =
    routed.length > 0
      ? attachRouted(onnxPath, file.model, routed, source.folds)
      : attachAdapter(onnxPath, file.model, contents.modules, as, source.folds);
  await mkdir(join(folder, 'onnx'), { recursive: true });
  const name = basename(onnxPath);
  const { data } = await writeOnnx(model, join(folder, 'onnx'), name);
  const runtime = source.config['transformers.js_config'];
  await writeJson(join(folder, 'config.json'), {
    ...source.config,
    'transformers.js_config': {
      ...(typeof runtime === 'object' ? runtime : {}),
      use_external_data_format: data.length > 0 ? { [name]: data.length } : {},
    },
  });
  await copyModelFiles(source.folder, folder);
  for (const kept of KEPT) {
    try {
      await copyFile(join(dirname(dirname(onnxPath)), kept), join(folder, kept));
    } catch (error) {
      if (errorCode(error) !== 'ENOENT') throw error;
    }
  }
}

/**
 * The feeds of an artifact that `adapt convert --to onnx-inputs` wrote, for the PEFT adapter in the folder `path`: names, shapes and float32 values of
 * its factors. An input that is not among them is fed with rank 0, shape (inFeatures, 0) or (0, outFeatures). Throws as `adapt convert` for a folder that is no adapter.
 */
export async function readAdapterFeeds(path: string): Promise<readonly AdapterFeed[]> {
  const contents = await readAdapterFolder(path);
  if (contents.routed.length > 0 || contents.deltas.length > 0)
    throw new UnsupportedError(`${path}: is no pair of factors a layer (${contents.layout}), which alone can be fed`);
  const unsaid = contents.modules.find(({ magnitude }) => magnitude !== undefined)?.name ?? contents.saved[0]?.name;
  if (unsaid !== undefined) throw new UnsupportedError(`${path}: "${unsaid}" is more than two factors, which cannot be fed`);
  return feedsOf(contents.modules);
}
