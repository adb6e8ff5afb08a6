/** What a merge says of itself: its inputs by content, pcomp.json, report.json and the model card. */
import { createHash } from 'node:crypto';
import { open, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { type HashedFile, hashFile, writeJson } from './artifacts/manifest.ts';
import { compareBytes, type MergeInput } from './artifacts/merge/merge-input.ts';
import type { MergeInputs } from './merge-inputs.ts';
import type { MergeRecipe } from './merge-recipe.ts';
import type { MergeSchedule } from './merge-schedule.ts';
import type { TensorResult } from './merge-tensor.ts';
import type { MergePlan } from './methods/merge/merge-plan.ts';
import { packageVersion } from './package-root.ts';

/** The recipe as pcomp.json has it: without this machine in it. */
export function portableRecipe(recipe: MergeRecipe, { base, experts }: MergeInputs): Record<string, unknown> {
  const { threads: _, maxMemory: __, chosen: ___, base: ____, ...portable } = recipe;
  return { ...(base ? { base: base.label } : {}), experts: experts.map(({ label }) => label), ...portable };
}

/** What is known of a file without reading all of it. */
interface FileMark {
  readonly name: string;
  readonly bytes: number;
  /** Of the length and header of a safetensors file. */
  readonly headerSha256: string;
  /** Of its first and last 64 KiB. */
  readonly edgesSha256: string;
}

const EDGE_BYTES = 64 * 1024;

async function markOf(path: string, byteLength: number): Promise<FileMark> {
  const handle = await open(path, 'r');
  try {
    const read = async (start: number, end: number) => {
      const bytes = Buffer.alloc(Math.max(0, end - start));
      await handle.read(bytes, 0, bytes.byteLength, start);
      return bytes;
    };
    const sha = (...parts: Uint8Array[]) => parts.reduce((hash, part) => hash.update(part), createHash('sha256')).digest('hex');
    const first = await read(0, Math.min(EDGE_BYTES, byteLength));
    const last = await read(Math.max(0, byteLength - EDGE_BYTES), byteLength);
    const isIndex = path.endsWith('.json');
    const headerEnd = isIndex ? byteLength : 8 + Number(first.readBigUInt64LE(0));
    return {
      name: basename(path),
      bytes: byteLength,
      headerSha256: sha(await read(0, headerEnd)),
      edgesSha256: sha(first, last),
    };
  } finally {
    await handle.close();
  }
}

/** Every file of every input, and the hash that a resumed run must share. */
export async function markInputs(inputs: MergeInputs, recipe: MergeRecipe): Promise<{ marks: FileMark[][]; hash: string }> {
  const marks: FileMark[][] = [];
  for (const { tensors } of inputs.all) {
    marks.push(await Promise.all(tensors.files.map(({ path, byteLength }) => markOf(path, byteLength))));
  }
  const adapters = inputs.all.map(({ adapter }) => adapter ?? null);
  const all = [portableRecipe(recipe, inputs), marks, adapters, inputs.config, inputs.outputs, packageVersion()];
  return { marks, hash: createHash('sha256').update(JSON.stringify(all)).digest('hex') };
}

/** Writes pcomp.json into the finished folder: equal for equal requests, whatever the machine. */
export async function writeMergeManifest(
  folder: string,
  parts: {
    readonly recipe: MergeRecipe;
    readonly inputs: MergeInputs;
    readonly schedule: MergeSchedule;
    /** What was learned, or given. */
    readonly plan: MergePlan | undefined;
    readonly marks: readonly (readonly FileMark[])[];
    readonly results: ReadonlyMap<string, TensorResult>;
    /** Files beside the weights. */
    readonly files: readonly string[];
  },
): Promise<void> {
  const { recipe, inputs, schedule, plan, marks, results, files } = parts;
  const outputs: Record<string, HashedFile | { bytes: number; headerSha256: string }> = {};
  for (const { name, prefix, byteLength } of schedule.layout.files) {
    outputs[name] = { bytes: byteLength, headerSha256: createHash('sha256').update(prefix).digest('hex') };
  }
  for (const name of files) outputs[name] = await hashFile(join(folder, name));
  const tensors = [...schedule.dispositions].map(([name, { disposition, rule, dtype }]) => {
    const source = inputs.outputs.find((output) => output.name === name)?.made;
    const result = results.get(source?.by === 'tie' ? source.like : name);
    return [name, { disposition, rule, dtype, sha256: result?.sha256 }];
  });
  await writeJson(join(folder, 'pcomp.json'), {
    format: 1,
    command: 'merge',
    recipe: portableRecipe(recipe, inputs),
    plan: { ...(plan ?? { method: recipe.method }), counts: countDispositions(schedule) },
    seed: recipe.seed,
    device: 'cpu',
    versions: { pcomp: packageVersion() },
    inputs: inputs.all.map((input, i) => describeInput(input, i, marks[i], results)),
    outputs,
    tensors: Object.fromEntries(tensors),
  });
}

/** Tensors of the result by what was done to them. */
export function countDispositions({ dispositions }: MergeSchedule): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const { disposition } of dispositions.values()) counts[disposition] = (counts[disposition] ?? 0) + 1;
  return counts;
}

function describeInput(
  { label, place, tensors }: MergeInput,
  index: number,
  marks: readonly FileMark[],
  results: ReadonlyMap<string, TensorResult>,
): Record<string, unknown> {
  const read = new Map<string, string>();
  for (const { inputs } of results.values()) {
    for (const { input, name, sha256 } of inputs) if (input === index) read.set(name, sha256);
  }
  // Over the sorted list of what was read, so that it does not depend on how the checkpoint is cut into files.
  const content = createHash('sha256');
  for (const name of [...read.keys()].sort(compareBytes)) {
    const { dtype, shape } = tensors.tensors.get(name)!;
    content.update(`${JSON.stringify([name, dtype, shape, read.get(name)])}\n`);
  }
  return {
    label,
    kind: place.kind,
    files: marks.map(({ name, bytes, headerSha256 }) => ({ name, bytes, headerSha256 })),
    tensors: read.size,
    contentSha256: content.digest('hex'),
  };
}

/** Writes README.md: a model card that says what was merged, how, and how to do it again. */
export async function writeCard(folder: string, { base, experts, config }: MergeInputs, recipe: MergeRecipe): Promise<void> {
  const command = [
    'pcomp merge',
    ...experts.map(({ place }) => basename(place.path)),
    ...(base ? [`--base ${basename(base.place.path)}`] : []),
    `--method ${recipe.method}`,
    ...(recipe.preset === 'best' ? [] : [`--preset ${recipe.preset}`]),
    ...(recipe.weights.length === 0 ? [] : [`--weights ${recipe.weights.join(',')}`]),
    ...recipe.set.map((setting) => `--set '${setting}'`),
    ...(recipe.dtype === undefined ? [] : [`--dtype ${recipe.dtype}`]),
    ...(recipe.seed === 0 ? [] : [`--seed ${recipe.seed}`]),
    '-o merged',
  ].join(' ');
  const models = [...(base ? [base] : []), ...experts].map(({ label }) => `- ${label}`);
  const architecture = Array.isArray(config?.['architectures']) ? ` (${String(config['architectures'][0])})` : '';
  const text = [
    '---',
    ...(base || experts.length > 0 ? ['base_model:', ...models] : []),
    'base_model_relation: merge',
    'library_name: transformers',
    'tags:',
    '- merge',
    '- pcomp',
    '---',
    `# Merge of ${experts.map(({ label }) => label).join(', ')}`,
    '',
    `${experts.length} models${architecture} merged by \`${recipe.method}\`${base ? `, with ${base.label} as the base` : ''}. Made with pcomp ${packageVersion()}:`,
    '',
    `    ${command}`,
    '',
    '`pcomp.json` has the hash of every tensor that went in and came out.',
    '',
  ].join('\n');
  await writeFile(join(folder, 'README.md'), text);
}
