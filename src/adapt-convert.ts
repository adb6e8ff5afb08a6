/** `adapt convert`: an adapter in another form: plain factors at unit scale, padded to one rank, or folded into its base. */
import { createHash } from 'node:crypto';
import { basename, join, resolve } from 'node:path';
import { writeWithAdapter } from './adapt-onnx.ts';
import { type AdapterContents, readAdapterFolder } from './artifacts/adapter-reader.ts';
import { type HashedFile, hashFolder, writeJson } from './artifacts/manifest.ts';
import { ADAPTER_CONFIG, placesOf } from './artifacts/merge/merge-input.ts';
import { openModelSource } from './artifacts/model-source.ts';
import { OutputFolder } from './artifacts/output-folder.ts';
import { padded, writeAdapter } from './artifacts/peft.ts';
import { RecipeError, UnsupportedError } from './errors.ts';
import { type RoutedShape, routedParameters } from './graph/routed-branch.ts';
import { merge } from './merge.ts';
import { mergeRecipe } from './merge-recipe.ts';
import { packageVersion } from './package-root.ts';
import type { RunHooks } from './run.ts';

export const CONVERSIONS = ['peft', 'peft-padded', 'merged', 'onnx', 'onnx-inputs'] as const;

/** The form that is wanted, and how. */
export interface ConvertRequest {
  readonly to: (typeof CONVERSIONS)[number];
  /** The model that the adapter is of: needed to fold it in, or to go beside it; else the adapter is checked against it. */
  readonly base?: string;
  readonly overwrite: boolean;
  readonly threads: number;
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
}

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

/** Throws RecipeError for a request that makes no sense, then as `readAdapterFolder` and `merge`. */
export async function convertAdapter(
  path: string,
  output: string,
  { to, base, overwrite, threads }: ConvertRequest,
  hooks: RunHooks = {},
): Promise<ConvertOutcome> {
  if (output === '') throw new RecipeError('-o: the name of a folder to write is needed');
  if (to === 'merged') {
    if (base === undefined) throw new RecipeError('--base: --to merged needs the model that the adapter is of');
    await refuseQuantized(base);
    const [place] = await placesOf([path]);
    if (place.kind !== 'adapter') throw new RecipeError(`${path}: holds no ${ADAPTER_CONFIG}, so it is no adapter`);
    const recipe = mergeRecipe({ base, method: 'linear', threads }, threads);
    await merge([path], output, recipe, { overwrite, resume: false, dryRun: false }, hooks);
    return { to, output };
  }
  if (to.startsWith('onnx') && base === undefined)
    throw new RecipeError(`--base: --to ${to} needs the ONNX artifact that the adapter goes beside`);
  const contents = await readContents(path, base);
  refuseForm(path, contents, to);
  const recipe = { adapter: basename(resolve(path)), to, ...(base === undefined ? {} : { base: basename(resolve(base)) }) };
  const inputs: Record<string, HashedFile> = await hashFolder(path);
  if (to.startsWith('onnx')) for (const [name, file] of Object.entries(await hashFolder(base!))) inputs[`base/${name}`] = file;
  const recipeHash = createHash('sha256')
    .update(JSON.stringify([recipe, inputs, packageVersion()]))
    .digest('hex');
  await using folder = await OutputFolder.open({ path: output, overwrite, resume: false, recipeHash });
  const most = Math.max(...contents.modules.map(({ rank }) => rank));
  const modules =
    to === 'peft-padded' ? contents.modules.map((module) => ({ ...module, ...padded(module, most) })) : contents.modules;
  if (to === 'onnx' || to === 'onnx-inputs')
    await writeWithAdapter(base!, contents, folder.artifactPath, to === 'onnx' ? 'constants' : 'inputs');
  else await writeAdapter(folder.artifactPath, { ...contents, base: contents.base ?? recipe.base ?? '', modules });
  await writeJson(join(folder.artifactPath, 'pcomp.json'), {
    format: 1,
    command: 'adapt convert',
    recipe,
    versions: { pcomp: packageVersion() },
    inputs,
    outputs: await hashFolder(folder.artifactPath),
  });
  await folder.finalize();
  return { to, output, adapter: outlineOf({ ...contents, modules }) };
}

/** Forms that only say low-rank factors. */
function refuseForm(path: string, { layout, routed, deltas }: AdapterContents, to: ConvertRequest['to']): void {
  if (routed.length > 0)
    throw new UnsupportedError(`${path}: routes every token through experts (${layout}), which --to ${to} cannot say`);
  if (deltas.length > 0)
    throw new UnsupportedError(`${path}: changes single weights (${layout}), which --to ${to} cannot say; --to merged adds them`);
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
