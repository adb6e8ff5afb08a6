/** `adapt convert`: an adapter in another form: plain factors at unit scale, padded to one rank, or folded into its base. */
import { createHash } from 'node:crypto';
import { basename, join, resolve } from 'node:path';
import { type AdapterContents, adapterForm, readAdapterFolder } from '../../artifacts/adapter-reader.ts';
import { type HashedFile, hashFolder, writeJson } from '../../artifacts/manifest.ts';
import { placesOf } from '../../artifacts/merge/merge-input.ts';
import { openModelSource } from '../../artifacts/model-source.ts';
import { OutputFolder } from '../../artifacts/output-folder.ts';
import { padded, writeAdapter } from '../../artifacts/peft.ts';
import { writeRouted } from '../../artifacts/routed-adapter.ts';
import { writeDelta } from '../../artifacts/sparse-delta.ts';
import { Spool } from '../../calibration/state-store.ts';
import { loadTokenizer } from '../../calibration/tokenizer.ts';
import { createEngine } from '../../compute/ort.ts';
import { createBlas } from '../../compute/ort-blas.ts';
import { RecipeError, UnsupportedError } from '../../errors.ts';
import { type RoutedShape, routedParameters } from '../../graph/routed-branch.ts';
import { packageVersion } from '../../package-root.ts';
import type { RunHooks } from '../run.ts';
import { assertFits } from './adapter-weights.ts';
import { FOLD_LIMIT, type FoldedModule, foldDeltas, foldRouted, requireFaithful } from './fold.ts';
import { hashModel, hashTexts } from './inputs.ts';
import { writeMerged } from './merged.ts';
import { writeWithAdapter } from './onnx.ts';
import { endOfText, readTrainingText } from './text.ts';

export const CONVERSIONS = ['peft', 'peft-padded', 'merged', 'onnx', 'onnx-inputs', 'routed', 'delta'] as const;
export const FOLDS = ['ls', 'mean'] as const;

/** The form that is wanted, and how. */
export interface ConvertRequest {
  readonly to: (typeof CONVERSIONS)[number];
  /** The model that the adapter is of: needed to fold it in, or to go beside it; else the adapter is checked against it. */
  readonly base?: string;
  readonly overwrite: boolean;
  readonly threads: number;
  /** Routed experts as plain factors: text that they are fitted to and, its end, measured on. */
  readonly text?: readonly string[];
  /** What is folded: rank of the factors, the error that is allowed (default 0.05), and how experts are. */
  readonly rank?: number;
  readonly maxError?: number;
  readonly fold?: (typeof FOLDS)[number];
}

/** What was converted. */
export interface ConvertOutcome {
  readonly to: ConvertRequest['to'];
  readonly output: string;
  /** What the adapter was stored as, and its layers; absent where it was folded in. */
  readonly adapter?: {
    readonly layout: AdapterContents['layout'];
    readonly modules: readonly AdaptedShape[];
    readonly parameters: number;
  };
  /** What was lost of layers that are no plain factors by their nature. */
  readonly folded?: readonly FoldLoss[];
}

/** What folding lost of a layer. */
export type FoldLoss = Pick<FoldedModule, 'name' | 'rank' | 'error' | 'entropy'>;

/** A layer of an adapter. */
export interface AdaptedShape {
  readonly name: string;
  readonly outFeatures: number;
  readonly inFeatures: number;
  /** Of all its experts together; 0 for a sparse update. */
  readonly rank: number;
  readonly parameters: number;
  readonly routed?: RoutedShape;
}

/** Throws RecipeError for a request that makes no sense, then as `readAdapterFolder` and `merge`. What is stopped leaves nothing. */
export async function convertAdapter(
  path: string,
  output: string,
  request: ConvertRequest,
  hooks: RunHooks = {},
): Promise<ConvertOutcome> {
  const { to, base, overwrite, threads } = request;
  if (output === '') throw new RecipeError('-o: the name of a folder to write is needed');
  if (to === 'merged' && base === undefined) throw new RecipeError('--base: --to merged needs the model that the adapter is of');
  if (to.startsWith('onnx') && base === undefined)
    throw new RecipeError(`--base: --to ${to} needs the ONNX artifact that the adapter goes beside`);
  const place = { path: output, overwrite, resume: false };
  await OutputFolder.check({ ...place, recipeHash: '' });
  if (to === 'merged') await refuseQuantized(base!);
  // A merge reads adapters itself, and more of them than plain factors can say; only experts go in as factors.
  const whole = to === 'merged' && (await adapterForm(path)) !== 'routed';
  if (whole) refuseFolding(request);
  const { contents, folded } = whole ? {} : await folding(path, await readContents(path, base), request, hooks);
  if (contents) refuseForm(path, contents, to);
  const { text, rank, maxError, fold } = request;
  const recipe = {
    adapter: basename(resolve(path)),
    to,
    ...(base === undefined ? {} : { base: basename(resolve(base)) }),
    ...(folded ? { text: text?.map((file) => basename(file)), rank, maxError, fold } : {}),
  };
  const inputs = await hashGiven(path, request, folded !== undefined);
  const recipeHash = createHash('sha256')
    .update(JSON.stringify([recipe, inputs, packageVersion()]))
    .digest('hex');
  await using folder = await OutputFolder.open({ ...place, recipeHash });
  const { artifactPath } = folder;
  const most = Math.max(...(contents?.modules ?? []).map(({ rank: own }) => own));
  const modules =
    to === 'peft-padded'
      ? contents!.modules.map((module) => ({ ...module, ...padded(module, most) }))
      : (contents?.modules ?? []);
  const named = contents && { ...contents, base: contents.base ?? recipe.base ?? '', modules };
  let written: Readonly<Record<string, unknown>> | undefined;
  if (to === 'merged') written = await writeMerged({ path, base: base!, plain: named, recipe, output, threads }, folder, hooks);
  else if (to === 'onnx' || to === 'onnx-inputs')
    await writeWithAdapter(base!, named!, artifactPath, to === 'onnx' ? 'constants' : 'inputs');
  else if (to === 'routed') await writeRouted(artifactPath, named!);
  else if (to === 'delta') await writeDelta(artifactPath, named!);
  else await writeAdapter(artifactPath, named!);
  await writeJson(join(artifactPath, 'pcomp.json'), {
    format: 1,
    command: 'adapt convert',
    recipe,
    ...(folded ? { folded } : {}),
    versions: { pcomp: packageVersion() },
    inputs,
    ...(written ?? { outputs: await hashFolder(artifactPath) }),
  });
  await folder.finalize();
  return {
    to,
    output,
    ...(contents && to !== 'merged' ? { adapter: outlineOf({ ...contents, modules }) } : {}),
    ...(folded ? { folded } : {}),
  };
}

/** What goes into the output: the adapter, the base where it does, and text where experts are fitted to it. */
async function hashGiven(path: string, { to, base, text = [] }: ConvertRequest, folded: boolean) {
  const inputs: Record<string, HashedFile> = await hashFolder(path);
  // An artifact goes in with all its files, of which some are copied.
  if (to.startsWith('onnx')) for (const [name, file] of Object.entries(await hashFolder(base!))) inputs[`base/${name}`] = file;
  else if (base !== undefined && (to === 'merged' || folded)) {
    await using source = await openModelSource(base);
    Object.assign(inputs, await hashModel('base', source));
  }
  return folded ? { ...inputs, ...(await hashTexts(text)) } : inputs;
}

/** The adapter as plain factors, where it is none and the form that is wanted asks for them. */
async function folding(
  path: string,
  contents: AdapterContents,
  request: ConvertRequest,
  hooks: RunHooks,
): Promise<{ readonly contents: AdapterContents; readonly folded?: readonly FoldLoss[] }> {
  const { to, base, text, threads, rank, maxError: limit = FOLD_LIMIT, fold = 'ls' } = request;
  const { routed, deltas } = contents;
  const plain = to === 'peft' || to === 'peft-padded' || to === 'merged';
  if (!plain || (routed.length === 0 && deltas.length === 0)) {
    refuseFolding(request);
    return { contents };
  }
  const rules = { limit, rank, fold };
  await using engine = await createEngine({ device: 'cpu', threads });
  const blas = createBlas(engine);
  let modules: FoldedModule[];
  if (deltas.length > 0) {
    if (text !== undefined || request.fold !== undefined)
      throw new RecipeError('--text, --fold: a sparse update is folded by itself, without text');
    modules = await foldDeltas(blas, deltas, rules);
  } else {
    if (base === undefined || text === undefined)
      throw new RecipeError(
        `${base === undefined ? '--base' : '--text'}: ${path} routes tokens through experts (${contents.layout}); --to ${to} folds them, which takes the model and text to measure on`,
      );
    await using source = await openModelSource(base);
    await using spool = new Spool({});
    const { model, weights } = source;
    const tokenizer = await loadTokenizer(source.folder, model.shape.vocabSize);
    const length = Math.min(FOLD_TOKENS, model.shape.contextLength);
    assertFits(source, contents, `${path}:`);
    const windows = await readTrainingText(tokenizer, text, length, endOfText(source.config));
    const forward = { model, engine, blas, spool, path: base, signal: hooks.signal };
    modules = await foldRouted(forward, weights, contents, windows, rules, hooks.progress);
  }
  requireFaithful(path, modules, limit);
  const folded = modules.map(({ name, rank: own, error, entropy }) => ({
    name,
    rank: own,
    error,
    ...(entropy === undefined ? {} : { entropy }),
  }));
  // A layer that adds nothing has no factors.
  const factors = modules.filter(({ rank: own }) => own > 0);
  if (factors.length === 0)
    throw new UnsupportedError(`${path}: adds nothing to any layer, and nothing is left of it as factors`);
  return { contents: { ...contents, layout: 'lora', modules: factors, routed: [], deltas: [] }, folded };
}

/** Tokens of a window that experts are measured on. */
const FOLD_TOKENS = 512;

function refuseFolding({ text, rank, maxError, fold, to }: ConvertRequest): void {
  const given = { '--text': text, '--rank': rank, '--max-error': maxError, '--fold': fold };
  const [flag] = Object.entries(given).find(([, value]) => value !== undefined) ?? [];
  if (flag !== undefined)
    throw new RecipeError(`${flag}: says how an adapter is folded to plain factors, and nothing is by --to ${to}`);
}

/** Forms that an adapter does not have. */
function refuseForm(path: string, { layout, routed, deltas }: AdapterContents, to: ConvertRequest['to']): void {
  if (to === 'routed' && routed.length === 0)
    throw new UnsupportedError(`${path}: has no router (${layout}): --to routed keeps experts as they are`);
  if (to === 'delta' && deltas.length === 0)
    throw new UnsupportedError(`${path}: changes whole layers (${layout}): --to delta keeps sparse updates as they are`);
}

async function refuseQuantized(base: string): Promise<void> {
  await using source = await openModelSource(base);
  if (source.kind === 'float') return;
  throw new UnsupportedError(
    `--base ${base}: is quantized (layout ${source.kind}), and an adapter folded into it would be rounded away; fold it into the float model, and quantize that`,
  );
}

async function readContents(path: string, base: string | undefined): Promise<AdapterContents> {
  if (base === undefined) return await readAdapterFolder(path);
  await using source = await openModelSource(base);
  return await readAdapterFolder(path, source.tensors.tensors);
}

/** What layers an adapter has. */
function outlineOf({ layout, modules, routed, deltas }: AdapterContents): NonNullable<ConvertOutcome['adapter']> {
  const shapes: AdaptedShape[] = [
    ...modules.map(({ name, rank, loraA, loraB }) => {
      const [outFeatures, inFeatures] = [loraB.length / rank, loraA.length / rank];
      return { name, outFeatures, inFeatures, rank, parameters: rank * (outFeatures + inFeatures) };
    }),
    ...routed.map((module) => {
      const { name, outFeatures, inFeatures, routed: shape, expertsB } = module;
      const rank = expertsB.length / outFeatures;
      return { name, outFeatures, inFeatures, rank, parameters: routedParameters(shape, module), routed: shape };
    }),
    ...deltas.map(({ name, outFeatures, inFeatures, values }) => ({
      name,
      outFeatures,
      inFeatures,
      rank: 0,
      parameters: values.length,
    })),
  ];
  return { layout, modules: shapes, parameters: shapes.reduce((sum, { parameters }) => sum + parameters, 0) };
}

/** The layers of the adapter in the folder `path`; undefined for what is no adapter. */
export async function inspectAdapter(path: string): Promise<NonNullable<ConvertOutcome['adapter']> | undefined> {
  const [place] = await placesOf([path]);
  return place.kind === 'adapter' ? outlineOf(await readAdapterFolder(path)) : undefined;
}
