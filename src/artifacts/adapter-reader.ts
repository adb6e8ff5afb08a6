/** Adapters of every kind that pcomp knows, as factors at unit scale: what `convert` writes and `evaluate --adapter` applies. */
import { existsSync } from 'node:fs';
import { toFloat32 } from '../../formats/dtype.ts';
import { quote } from '../../formats/safetensors/header.ts';
import type { TensorInfo, TensorSource } from '../../formats/tensor.ts';
import { RecipeError, UnsupportedError } from '../errors.ts';
import { type Block, coreFactors, incrementalFactors, triangularFactors } from './adapter-lists.ts';
import { readAdapter } from './merge/adapter.ts';
import { ADAPTER_CONFIG, labelOf, type MergeInput, openInput, placesOf, readJsonObject } from './merge/merge-input.ts';
import type { AdapterModule, SavedModule } from './peft.ts';
import { ROUTED_CONFIG, type RoutedModule, readRouted, routedLayout } from './routed-adapter.ts';
import { type DeltaModule, isDelta, readDeltas } from './sparse-delta.ts';

/** An adapter in memory: small beside any base. */
export interface AdapterContents {
  /** What it was stored as. */
  readonly layout: 'lora' | 'adalora' | 'increlora' | 'triadaptlora' | 'lamda' | 'mola' | 'tmoe' | 'delta';
  /** `base_model_name_or_path`, if it is given. */
  readonly base: string | undefined;
  /** In the order of their names; a layer of rank 0 has none. */
  readonly modules: readonly AdapterModule[];
  /** Modules that are stored whole. */
  readonly saved: readonly SavedModule[];
  /** Routed experts; a folder has these, or sparse updates, or factors. */
  readonly routed: readonly RoutedModule[];
  readonly deltas: readonly DeltaModule[];
  /** The base stores its layers (in, out). */
  readonly transposed: boolean;
}

/** Tensors of a list layout: module, role, number in the list or name of the adapter. */
const LISTED =
  /^(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_E|lora_C_row|lora_C_col|sigma|ranknum)(?:\.([^.]+))?(?:\.weight)?$/;

/**
 * Reads the adapter in the folder `path`. @param base tensors of the base, which modules are then matched with and checked against.
 * Throws RecipeError for what is no adapter or does not fit the base, UnsupportedError for what plain factors cannot say, FormatError.
 */
export async function readAdapterFolder(path: string, base?: ReadonlyMap<string, TensorInfo>): Promise<AdapterContents> {
  return await opened(path, async (tensors, about) => {
    const own = await readOwnForm(tensors, about);
    return own ? checked(path, own, base) : await readPlain(tensors, about, base);
  });
}

/** Whether a folder has routed experts, a sparse update, or factors of any kind, by the names of its tensors. Throws RecipeError for what is no adapter. */
export async function adapterForm(path: string): Promise<'routed' | 'delta' | 'factors'> {
  return await opened(path, async ({ tensors }) => {
    const names = [...tensors.keys()];
    return routedLayout(names) ? 'routed' : isDelta(names) ? 'delta' : 'factors';
  });
}

/** An open adapter in another form than plain factors; undefined for what is stored as those, or is no adapter. */
export async function readUnplain({ place, tensors, adapter }: MergeInput): Promise<AdapterContents | undefined> {
  return adapter === undefined ? undefined : await readOwnForm(tensors, aboutOf(place.path, adapter));
}

/** Lists of blocks, a square core, routed experts, a sparse update: undefined for none of them. */
async function readOwnForm(tensors: TensorSource, about: About): Promise<AdapterContents | undefined> {
  const { path, config, base } = about;
  const names = [...tensors.tensors.keys()];
  const common = { base, modules: [], saved: [], routed: [], deltas: [], transposed: config['fan_in_fan_out'] === true };
  const layout = routedLayout(names);
  if (layout) {
    const file = `${path}/${ROUTED_CONFIG}`;
    const routedConfig = existsSync(file) ? await readJsonObject(file) : undefined;
    const routed = await readRouted({ path, config, routedConfig }, names, (name) => load(tensors, name));
    return { ...common, layout, routed };
  }
  if (isDelta(names)) return { ...common, layout: 'delta', deltas: await readDeltas(path, config, tensors) };
  return isListed(tensors) ? await readLists(tensors, about) : undefined;
}

async function opened<T>(path: string, read: (tensors: TensorSource, about: About) => Promise<T>): Promise<T> {
  const [place] = await placesOf([path]);
  if (place.kind !== 'adapter') throw new RecipeError(`${path}: holds no ${ADAPTER_CONFIG}, so it is no adapter`);
  const { tensors, adapter } = await openInput(place, labelOf(place));
  try {
    return await read(tensors, aboutOf(path, adapter!));
  } finally {
    await tensors.close();
  }
}

/** What is not plain has the base's own names. */
function checked(path: string, contents: AdapterContents, base?: ReadonlyMap<string, TensorInfo>): AdapterContents {
  const factors = contents.modules.map(({ name, rank, loraA, loraB }) => ({
    name,
    outFeatures: loraB.length / rank,
    inFeatures: loraA.length / rank,
  }));
  for (const { name, outFeatures, inFeatures } of base ? [...factors, ...contents.routed, ...contents.deltas] : []) {
    const own = [outFeatures, inFeatures];
    const expected = contents.transposed ? own.toReversed() : own;
    const tensor = base!.get(`${name}.weight`);
    if (tensor?.shape.join() === expected.join()) continue;
    const found = tensor ? `the base's is [${tensor.shape.join(', ')}]` : 'the base has none';
    throw new RecipeError(`${path}: module ${quote(name)} changes a tensor of [${expected.join(', ')}], but ${found}`);
  }
  return contents;
}

interface About {
  readonly path: string;
  readonly config: Readonly<Record<string, unknown>>;
  readonly base: string | undefined;
}

function aboutOf(path: string, config: About['config']): About {
  return { path, config, base: named(config['base_model_name_or_path']) };
}

async function readPlain(
  tensors: TensorSource,
  { path, config, base: baseName }: About,
  base: ReadonlyMap<string, TensorInfo> | undefined,
): Promise<AdapterContents> {
  const origins = readAdapter({ path, config, configPath: `${path}/${ADAPTER_CONFIG}`, tensors: tensors.tensors }, base);
  const modules: AdapterModule[] = [];
  const saved: SavedModule[] = [];
  let transposed = false;
  for (const [target, origin] of origins) {
    const name = target.replace(/\.weight$/, '');
    const refuse = (what: string) =>
      new UnsupportedError(
        `${path}: module ${quote(name)} ${what}, which plain factors cannot say; --to merged, or pcomp merge, folds it in`,
      );
    if (!target.endsWith('.weight')) throw refuse('changes a bias');
    if (origin.kind === 'stored') {
      const { shape, values } = await load(tensors, origin.name);
      if (shape.length !== 2) throw refuse(`is stored whole as [${shape.join(', ')}]`);
      saved.push({ name, shape, weight: values });
      continue;
    }
    if (origin.kind !== 'low-rank') throw refuse('is no LoRA');
    if (/\.lora_embedding_A/.test(origin.a)) throw refuse('is an embedding');
    const [a, b] = [await load(tensors, origin.a), await load(tensors, origin.b)];
    const e = origin.e === undefined ? undefined : (await load(tensors, origin.e)).values;
    const [rank] = a.shape;
    modules.push({
      name,
      rank,
      loraA: a.values,
      loraB: b.values.map((value, i) => value * origin.scale * (e ? e[i % rank] : 1)),
      ...(origin.magnitude === undefined ? {} : { magnitude: (await load(tensors, origin.magnitude)).values }),
    });
    transposed ||= origin.transposed;
  }
  const layout = config['peft_type'] === 'ADALORA' ? 'adalora' : 'lora';
  return { layout, base: baseName, modules: byName(modules), saved, routed: [], deltas: [], transposed };
}

function isListed({ tensors }: TensorSource): boolean {
  return [...tensors.keys()].some((name) => /\.(lora_[ABE]\.\d+|lora_C_(row|col)(\.\d+)?|sigma(\.[^.]+)?\.weight)$/.test(name));
}

async function readLists(tensors: TensorSource, { path, config, base }: About): Promise<AdapterContents> {
  const modules = new Map<string, Map<string, { readonly order: number; readonly block: Block }[]>>();
  for (const name of tensors.tensors.keys()) {
    const match = LISTED.exec(name);
    if (match === null) throw new UnsupportedError(`${path}: tensor ${quote(name)} is no part of an adapter that pcomp knows`);
    const [, module, role, number] = match;
    const roles = modules.get(module) ?? new Map();
    modules.set(module, roles);
    const order = /^\d+$/.test(number ?? '') ? Number(number) : 0;
    roles.set(role, [...(roles.get(role) ?? []), { order, block: await load(tensors, name) }]);
  }
  const { lora_alpha: alpha, fan_in_fan_out: transposed } = config;
  if (typeof alpha !== 'number' || !Number.isFinite(alpha))
    throw new RecipeError(`${path}: ${ADAPTER_CONFIG} gives no lora_alpha, which the scale is made of`);
  for (const field of ['alpha_pattern', 'use_rslora', 'use_dora']) {
    const value = config[field];
    if (!value || (typeof value === 'object' && Object.keys(value).length === 0)) continue;
    throw new UnsupportedError(
      `${path}: ${ADAPTER_CONFIG} has ${field} ${JSON.stringify(value)}, which pcomp reads with plain LoRA factors only`,
    );
  }
  let layout: AdapterContents['layout'] = 'increlora';
  const factors = [...modules].map(([module, roles]) => {
    const blocks = new Map(
      [...roles].map(([role, all]) => [role, all.toSorted((x, y) => x.order - y.order).map(({ block }) => block)]),
    );
    const context = { path, module, alpha };
    if (blocks.has('sigma')) {
      layout = 'lamda';
      return coreFactors(context, blocks);
    }
    if (blocks.has('lora_C_row')) {
      layout = 'triadaptlora';
      return triangularFactors(context, blocks);
    }
    return incrementalFactors(context, blocks, blocks.get('ranknum')?.[0].values[0]);
  });
  return { layout, base, modules: byName(factors), saved: [], routed: [], deltas: [], transposed: transposed === true };
}

async function load(tensors: TensorSource, name: string): Promise<Block> {
  const { dtype, shape, data } = await tensors.read(name);
  if (!/^(BF16|F16|F32|F64)$/.test(dtype))
    throw new UnsupportedError(`${tensors.path}: tensor ${quote(name)} is ${dtype}, not float`);
  return { name, shape, values: toFloat32(dtype as 'F32', data) };
}

function byName(modules: readonly AdapterModule[]): AdapterModule[] {
  return modules.filter(({ rank }) => rank > 0).toSorted((x, y) => (x.name < y.name ? -1 : 1));
}

function named(value: unknown): string | undefined {
  return typeof value === 'string' && value !== '' ? value : undefined;
}
