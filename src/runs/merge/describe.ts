/** What a merge says of itself in pcomp.json: the recipe, its inputs by content, and every tensor of the result. */
import { createHash } from 'node:crypto';
import { basename, join } from 'node:path';
import { type HashedFile, hashFile, writeJson } from '../../artifacts/manifest.ts';
import { compareBytes, type MergeInput } from '../../artifacts/merge/merge-input.ts';
import type { MergePlan } from '../../methods/merge/merge-plan.ts';
import { MOE } from '../../methods/merge/moe/layouts.ts';
import { packageVersion } from '../../package-root.ts';
import type { MergeInputs } from './inputs.ts';
import type { LambdaReport } from './lambda-search.ts';
import type { FileMark, InputMarks } from './marks.ts';
import { portableMergekit } from './mergekit/inputs.ts';
import type { MergeRecipe } from './recipe.ts';
import type { MergeSchedule } from './schedule.ts';
import type { TensorResult } from './tensor.ts';

/** The recipe as pcomp.json has it: without this machine in it, and without folders on the way to files. */
export function portableRecipe(recipe: MergeRecipe, { base, experts }: MergeInputs): Record<string, unknown> {
  const {
    threads: _,
    maxMemory: __,
    chosen: ___,
    base: ____,
    calibration,
    generate,
    plan,
    mergekit,
    prompts,
    negative,
    ...portable
  } = recipe;
  const { gate, topK, ...dense } = portable;
  const routed = { gate, topK, prompts: prompts.map(withoutFolders), negative: negative.map(withoutFolders) };
  return {
    ...(base ? { base: base.label } : {}),
    experts: experts.map(({ label }) => label),
    ...dense,
    tokenizer: basename(portable.tokenizer),
    ...(portable.method === MOE ? routed : {}),
    ...(calibration.length === 0 ? {} : { calibration: calibration.map(withoutFolders) }),
    ...(generate ? {} : { generate }),
    ...(plan === undefined ? {} : { plan: basename(plan) }),
    ...(mergekit === undefined ? {} : { mergekit: portableMergekit(mergekit) }),
  };
}

/** `math=texts/math.jsonl` -> `math=math.jsonl`. */
function withoutFolders(text: string): string {
  const at = text.indexOf('=') + 1;
  return text.slice(0, at) + basename(text.slice(at));
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
    /** What was found on text. */
    readonly lambda: LambdaReport | undefined;
    readonly marks: InputMarks;
    readonly results: ReadonlyMap<string, TensorResult>;
    /** Files beside the weights. */
    readonly files: readonly string[];
  },
): Promise<void> {
  const { recipe, inputs, schedule, plan, lambda, marks, results, files } = parts;
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
    plan: { ...(plan ?? { method: recipe.method }), ...(lambda ? { lambda } : {}), counts: countDispositions(schedule) },
    seed: recipe.seed,
    device: 'cpu',
    versions: { pcomp: packageVersion() },
    inputs: inputs.all.map((input, i) => describeInput(input, i, marks.weights[i], results)),
    ...(inputs.vocabulary ? { vocabulary: inputs.vocabulary } : {}),
    ...(Object.keys(marks.texts).length === 0 ? {} : { texts: marks.texts }),
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
    files: marks,
    tensors: read.size,
    contentSha256: content.digest('hex'),
  };
}
