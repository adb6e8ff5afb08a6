/** Output heads that share the embedding's weights, and experts that see it differently from the base: nothing is lost silently. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { type MergeOutcome, merge } from '../../../src/runs/merge/merge.ts';
import { type MergeRequest, mergeRecipe } from '../../../src/runs/merge/recipe.ts';
import {
  type NamedTensor,
  nudged,
  randomTensor,
  readWeights,
  saveAdapter,
  saveFile,
  saveFolder,
  weightsOf,
} from '../../support/merge-models.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';
import { tinyLlama } from '../../support/tiny-models.ts';

const scratch = scratchFolder();
const HEAD = 'lm_head.weight';
const EMBEDDING = 'model.embed_tokens.weight';
const tied = tinyLlama('tied', { tie_word_embeddings: true });
const untied = tinyLlama('tied');
const tiedBase = weightsOf(tied);
const untiedBase = weightsOf(untied);
const expert = nudged(tiedBase, 1);
const ownHead = randomTensor([41, 32], 2);

type Weights = Map<string, NamedTensor>;

interface Result {
  readonly outcome: MergeOutcome;
  readonly weights: Weights;
  readonly config: { tie_word_embeddings?: boolean };
  readonly dispositions: Record<string, { disposition: string; rule: string }>;
}

async function run(base: Weights, config: object, experts: readonly Weights[], request: MergeRequest = {}): Promise<Result> {
  const folder = scratch.folder();
  await saveFolder(join(folder, 'base'), base, config as Record<string, unknown>);
  const paths = await Promise.all(experts.map((weights, i) => saveFile(join(folder, `e${i}.safetensors`), weights)));
  return finish(folder, paths, request);
}

async function finish(folder: string, paths: readonly string[], request: MergeRequest): Promise<Result> {
  const recipe = mergeRecipe({ base: join(folder, 'base'), method: 'linear', ...request }, 1);
  const out = join(folder, 'out');
  const outcome = await merge(paths, out, recipe, { overwrite: false, resume: false, dryRun: false });
  const read = (name: string) => JSON.parse(readFileSync(join(out, name), 'utf8'));
  return { outcome, weights: await readWeights(out), config: read('config.json'), dispositions: read('pcomp.json').tensors };
}

const withHead = (weights: Weights, head: NamedTensor): Weights => new Map([...weights, [HEAD, head]]);

describe('a base that ties its head', () => {
  it('stays without one, whatever copies experts store', async () => {
    const { weights, outcome, config } = await run(tiedBase, tied.config, [withHead(expert, expert.get(EMBEDDING)!)]);
    expect(weights).toEqual(expert);
    expect(outcome.notes).toEqual([`e0: its ${HEAD} is its embedding, which stands for both`]);
    expect(config.tie_word_embeddings).toBe(true);
  });

  it('refuses an expert whose head is its own', async () => {
    await expect(run(tiedBase, tied.config, [withHead(expert, ownHead)])).rejects.toThrow(
      /e0\.safetensors: has an output head of its own, but the base ties it.*--untie/,
    );
  });

  it('gets one with --untie: of every expert its own, or its embedding', async () => {
    const other = nudged(tiedBase, 3);
    const { weights, config } = await run(tiedBase, tied.config, [withHead(expert, ownHead), other], { untie: true });
    expect(config.tie_word_embeddings).toBe(false);
    const found = weights.get(HEAD)!.values;
    const [a, b] = [ownHead.values, other.get(EMBEDDING)!.values];
    for (let i = 0; i < found.length; i++) expect(found[i]).toBeCloseTo((a[i] + b[i]) / 2, 6);
  });

  it('with --untie moves from its embedding by the task vectors', async () => {
    const { weights } = await run(tiedBase, tied.config, [withHead(expert, ownHead)], {
      untie: true,
      method: 'task-arithmetic',
      set: ['lambda=0.5'],
    });
    const start = tiedBase.get(EMBEDDING)!.values;
    weights.get(HEAD)!.values.forEach((value, i) => {
      expect(value).toBeCloseTo((start[i] + ownHead.values[i]) / 2, 6);
    });
  });

  it('that stores both copies has both written from one merge', async () => {
    const both = withHead(tiedBase, tiedBase.get(EMBEDDING)!);
    const { weights, dispositions } = await run(both, tied.config, [expert]);
    expect(weights).toEqual(withHead(expert, expert.get(EMBEDDING)!));
    expect(dispositions[HEAD]).toMatchObject({ disposition: 'tied', rule: `to ${EMBEDDING}` });
  });

  it('but stores two that differ contradicts itself', async () => {
    const both = withHead(tiedBase, ownHead);
    await expect(run(both, tied.config, [expert])).rejects.toThrow(
      /ties lm_head.weight to model.embed_tokens.weight, but it stores two/,
    );
    const { weights, config } = await run(both, tied.config, [expert], { untie: true });
    expect(config.tie_word_embeddings).toBe(false);
    expect(weights.get(HEAD)).toEqual(expert.get(EMBEDDING));
  });

  it('refuses an adapter of the head, unless it is untied', async () => {
    const adapter = async (request: MergeRequest) => {
      const folder = scratch.folder();
      await saveFolder(join(folder, 'base'), tiedBase, tied.config);
      const saved = new Map([[`base_model.model.${HEAD}`, ownHead]]);
      return finish(folder, [await saveAdapter(join(folder, 'adapter'), saved)], request);
    };
    await expect(adapter({})).rejects.toThrow(/adapter: has an output head of its own/);
    const { weights } = await adapter({ untie: true });
    expect(weights).toEqual(withHead(tiedBase, ownHead));
  });
});

describe('a base with a head of its own', () => {
  it('takes the embedding of an expert that stores none', async () => {
    const { weights, outcome } = await run(untiedBase, untied.config, [expert]);
    expect(weights.get(HEAD)).toEqual(expert.get(EMBEDDING));
    expect(outcome.notes).toEqual([`e0: stores no ${HEAD}, so its embedding stands for it`]);
  });

  it('refuses one that says it is not tied', async () => {
    const folder = scratch.folder();
    await saveFolder(join(folder, 'base'), untiedBase, untied.config);
    const path = await saveFolder(join(folder, 'expert'), expert, untied.config);
    await expect(finish(folder, [path], {})).rejects.toThrow(/expert: lacks "lm_head.weight", .* and is not tied/);
  });
});
