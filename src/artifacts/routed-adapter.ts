/** Adapters of routed experts on disk, in the tensor names of the programs that made them: MoLA's and TMoE's (adapters.md 9.3). */
import { join } from 'node:path';
import { quote } from '../../formats/safetensors/header.ts';
import { createSafetensorsSink } from '../../formats/safetensors/writer.ts';
import { FormatError, RecipeError, UnsupportedError } from '../errors.ts';
import { type RoutedShape, routedSizes } from '../graph/routed-branch.ts';
import type { Block } from './adapter-lists.ts';
import { writeJson } from './manifest.ts';

/** Experts beside one linear layer, the scale in expertsB; tensors as src/graph/routed-branch.ts has them. */
export interface RoutedModule {
  readonly name: string;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly routed: RoutedShape;
  readonly router: Float32Array;
  readonly expertsA: Float32Array;
  readonly expertsB: Float32Array;
}

export interface RoutedFolder {
  /** As `base_model_name_or_path`. */
  readonly base: string;
  readonly routed: readonly RoutedModule[];
  /** Layers of the base are stored (in, out). */
  readonly transposed: boolean;
}

export const ROUTED_CONFIG = 'routed_config.json';

const MOLA = /^(?:base_model\.model\.)?(.+)\.(lora_A|lora_B)\.[^.]*?_(\d+)\.weight$/;
const MOLA_ROUTER = /^(?:base_model\.model\.)?(.+)\.router\.router\.weight$/;
const TMOE = /^(.+)\.tmoe\.(compress_expert|routed_experts|shared_expert|expert_route\.weight)(?:\.(\d+))?$/;

/** Whether these are tensors of routed experts, and whose. */
export function routedLayout(names: Iterable<string>): 'mola' | 'tmoe' | undefined {
  for (const name of names) {
    if (MOLA_ROUTER.test(name)) return 'mola';
    if (TMOE.test(name)) return 'tmoe';
  }
  return undefined;
}

/** One expert after the other: tensors of their own, as both programs keep them. */
function tensorsOf(module: RoutedModule): { name: string; shape: readonly number[]; values: Float32Array }[] {
  const { name, inFeatures: n, outFeatures: m, routed, router, expertsA, expertsB } = module;
  const { experts, rank, sharedA, sharedExpert, routing } = routed;
  const width = (experts + (sharedExpert ? 1 : 0)) * rank;
  const a = (j: number) => ({ shape: [rank, n], values: expertsA.slice(j * rank * n, (j + 1) * rank * n) });
  const b = (j: number) => ({ shape: [m, rank], values: columnsOf(expertsB, m, width, j * rank, rank) });
  const each = Array.from({ length: experts }, (_, j) => j);
  if (routing === 'topk') {
    const path = `base_model.model.${name}`;
    return [
      ...each.flatMap((j) => [
        { name: `${path}.lora_A.default_${j}.weight`, ...a(j) },
        { name: `${path}.lora_B.default_${j}.weight`, ...b(j) },
      ]),
      { name: `${path}.router.router.weight`, shape: [experts, n], values: router },
    ];
  }
  const path = `${name}.tmoe`;
  return [
    ...(sharedA
      ? [{ name: `${path}.compress_expert`, ...a(0) }]
      : each.map((j) => ({ name: `${path}.compress_expert.${j}`, ...a(j) }))),
    ...each.map((j) => ({ name: `${path}.routed_experts.${j}`, ...b(j) })),
    ...(sharedExpert ? [{ name: `${path}.shared_expert`, ...b(experts) }] : []),
    { name: `${path}.expert_route.weight`, shape: [experts, n], values: router },
  ];
}

function columnsOf(matrix: Float32Array, rows: number, columns: number, start: number, count: number): Float32Array {
  const part = new Float32Array(rows * count);
  for (let i = 0; i < rows; i++) part.set(matrix.subarray(i * columns + start, i * columns + start + count), i * count);
  return part;
}

/** Writes tensors, adapter_config.json and routed_config.json into `folder`. Throws UnsupportedError for what MoLA's names cannot say. */
export async function writeRouted(folder: string, { base, routed, transposed }: RoutedFolder): Promise<void> {
  const unsaid = routed.find(({ routed: { routing, sharedA, sharedExpert } }) => routing === 'topk' && (sharedA || sharedExpert));
  if (unsaid) throw new UnsupportedError(`"${unsaid.name}" picks experts that share an A, which MoLA's tensor names cannot say`);
  const tensors = routed.flatMap(tensorsOf);
  await using sink = await createSafetensorsSink(
    join(folder, 'adapter_model.safetensors'),
    tensors.map(({ name, shape }) => ({ name, dtype: 'F32', shape })),
  );
  for (const { name, values } of tensors)
    await sink.write(name, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
  await sink.finalize();
  const kind = routed[0].routed.routing;
  const rank = Math.max(...routed.map((module) => module.routed.rank));
  await writeJson(join(folder, ROUTED_CONFIG), {
    kind,
    modules: Object.fromEntries(
      routed.map(({ name, routed: shape }) => [
        name,
        {
          experts: shape.experts,
          top_k: shape.topK,
          rank: shape.rank,
          scale: 1,
          shared_a: shape.sharedA,
          shared_expert: shape.sharedExpert,
        },
      ]),
    ),
  });
  // Readers of one scale, alpha over rank, compute with 1 where all experts have that rank.
  await writeJson(join(folder, 'adapter_config.json'), {
    peft_type: kind === 'topk' ? 'MOLA' : 'TMOE',
    task_type: 'CAUSAL_LM',
    base_model_name_or_path: base,
    r: rank,
    lora_alpha: rank,
    lora_dropout: 0,
    bias: 'none',
    fan_in_fan_out: transposed,
    inference_mode: true,
    target_modules: routed.map(({ name }) => name),
  });
}

/** What routed_config.json or, without one, adapter_config.json and the tensors say of a module. */
export interface RoutedAbout {
  readonly path: string;
  readonly config: Readonly<Record<string, unknown>>;
  readonly routedConfig: Readonly<Record<string, unknown>> | undefined;
}

/** Experts a token goes through in MoLA, unless something else is said. */
const USUAL_TOP_K = 2;

/** Throws FormatError for tensors that do not fit together, UnsupportedError for one that is none of routed experts. */
export async function readRouted(
  about: RoutedAbout,
  names: Iterable<string>,
  load: (name: string) => Promise<Block>,
): Promise<RoutedModule[]> {
  const modules = new Map<string, Map<string, Block>>();
  for (const name of names) {
    const found = partOf(name);
    if (!found)
      throw new UnsupportedError(
        `${about.path}: tensor ${quote(name)} is no part of routed experts; pcomp leaves nothing of an adapter out`,
      );
    const parts = modules.get(found.module) ?? new Map<string, Block>();
    modules.set(found.module, parts.set(found.part, await load(name)));
  }
  return [...modules].sort(([x], [y]) => (x < y ? -1 : 1)).map(([name, parts]) => moduleOf(about, name, parts));
}

function partOf(name: string): { readonly module: string; readonly part: string } | undefined {
  const router = MOLA_ROUTER.exec(name);
  if (router) return { module: router[1], part: 'router' };
  const mola = MOLA.exec(name);
  if (mola) return { module: mola[1], part: `${mola[2] === 'lora_A' ? 'a' : 'b'} ${mola[3]}` };
  const tmoe = TMOE.exec(name);
  if (!tmoe) return undefined;
  const [, module, role, index] = tmoe;
  const part = { compress_expert: 'a', routed_experts: 'b', shared_expert: 'shared', 'expert_route.weight': 'router' }[role]!;
  return { module: module.replace(/^base_model\.model\./, ''), part: index === undefined ? part : `${part} ${index}` };
}

function moduleOf({ path, config, routedConfig }: RoutedAbout, name: string, parts: ReadonlyMap<string, Block>): RoutedModule {
  const refuse = (detail: string): never => {
    throw new FormatError(path, 'routed-experts', `module ${quote(name)} ${detail}`);
  };
  const router = parts.get('router') ?? refuse('has no router');
  const experts = [...parts.keys()].filter((part) => part.startsWith('b ')).length;
  const [first, shared] = [parts.get('a 0') ?? parts.get('a'), parts.get('shared')];
  if (experts === 0 || !first || !parts.get('b 0')) return refuse('has no experts from 0 on');
  const sharedA = parts.has('a');
  const [rank, inFeatures] = first.shape;
  const [outFeatures] = parts.get('b 0')!.shape;
  const topk = routingOf(routedConfig, parts);
  const said = moduleConfig(routedConfig, name);
  const topK = topk ? Math.min(experts, numberIn(said, 'top_k') ?? topKOf(config) ?? USUAL_TOP_K) : experts;
  const routed: RoutedShape = {
    routing: topk ? 'topk' : 'soft',
    experts,
    topK,
    rank,
    sharedA,
    sharedExpert: shared !== undefined,
  };
  const sizes = routedSizes(routed, { inFeatures, outFeatures });
  const as = Array.from({ length: sharedA ? 1 : experts }, (_, j) => parts.get(sharedA ? 'a' : `a ${j}`));
  const bs = [...Array.from({ length: experts }, (_, j) => parts.get(`b ${j}`)), ...(shared ? [shared] : [])];
  const expect = (block: Block | undefined, shape: readonly number[], what: string): Block => {
    if (block?.shape.join() !== shape.join())
      return refuse(`has ${what} ${block ? `[${block.shape.join(', ')}]` : 'missing'}, and [${shape.join(', ')}] is expected`);
    return block;
  };
  expect(router, sizes.router, 'a router of');
  const scale = numberIn(said, 'scale') ?? scaleIn(path, config, rank);
  const expertsA = new Float32Array(sizes.expertsA[0] * inFeatures);
  as.forEach((block, j) => {
    expertsA.set(expect(block, [rank, inFeatures], `A ${j}`).values, j * rank * inFeatures);
  });
  const [, width] = sizes.expertsB;
  const expertsB = new Float32Array(outFeatures * width);
  bs.forEach((block, j) => {
    const { values } = expect(block, [outFeatures, rank], `B ${j}`);
    for (let i = 0; i < outFeatures; i++)
      for (let k = 0; k < rank; k++) expertsB[i * width + j * rank + k] = scale * values[i * rank + k];
  });
  const used = 1 + as.length + bs.length;
  if (used !== parts.size) return refuse(`has ${parts.size} tensors, of which ${used} belong together`);
  for (const [field, found] of [
    ['experts', experts],
    ['rank', rank],
  ] as const) {
    const written = numberIn(said, field);
    if (written !== undefined && written !== found) return refuse(`has ${field} ${found}, and ${ROUTED_CONFIG} says ${written}`);
  }
  return { name, inFeatures, outFeatures, routed, router: router.values, expertsA, expertsB };
}

/** True: experts are picked. MoLA's tensors are, unless something else is said. */
function routingOf(config: RoutedAbout['routedConfig'], parts: ReadonlyMap<string, Block>): boolean {
  const kind = config?.['kind'];
  if (kind === 'topk' || kind === 'soft') return kind === 'topk';
  return !parts.has('a') && !/\.tmoe\./.test(parts.get('router')!.name);
}

function moduleConfig(config: RoutedAbout['routedConfig'], name: string): Readonly<Record<string, unknown>> {
  const modules = config?.['modules'] as Readonly<Record<string, Readonly<Record<string, unknown>>>> | undefined;
  return modules?.[name] ?? {};
}

function numberIn(fields: Readonly<Record<string, unknown>>, key: string): number | undefined {
  const value = fields[key];
  return typeof value === 'number' && Number.isFinite(value) ? value : undefined;
}

/** MoLA's own configuration has one for all, or one for each block, all alike. */
function topKOf(config: Readonly<Record<string, unknown>>): number | undefined {
  const value = config['top_k'];
  const first: unknown = Array.isArray(value) && value.every((one) => one === value[0]) ? value[0] : value;
  return typeof first === 'number' ? first : undefined;
}

/** alpha over the rank, or over its root. */
function scaleIn(path: string, config: Readonly<Record<string, unknown>>, rank: number): number {
  const alpha = config['lora_alpha'] ?? config['alpha'];
  if (typeof alpha !== 'number' || !Number.isFinite(alpha))
    throw new RecipeError(`${path}: adapter_config.json gives no lora_alpha, which the scale is made of`);
  return alpha / (config['use_rslora'] === true || config['rs_expert'] === true ? Math.sqrt(rank) : rank);
}
