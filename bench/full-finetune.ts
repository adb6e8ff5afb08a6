/**
 * Full fine-tuning of every linear layer, the bound of bench/adapt.ts: the trainer's own steps on updates of full rank. An update B A whose A is
 * the identity and frozen has the gradient dL/dW in B.
 */
import { openModelSource } from '../src/artifacts/model-source.ts';
import { Spool } from '../src/calibration/state-store.ts';
import { loadTokenizer } from '../src/calibration/tokenizer.ts';
import { createEngine } from '../src/compute/ort.ts';
import { createBlas } from '../src/compute/ort-blas.ts';
import { place } from '../src/methods/rank/training/initial.ts';
import type { TrainedModule, TrainingSchedule } from '../src/methods/rank/training/schedule.ts';
import { writeUpdates } from '../src/runs/adapt/output.ts';
import { endOfText, readTrainingText } from '../src/runs/adapt/text.ts';
import { Trainer } from '../src/runs/adapt/train.ts';

export interface FullFineTuning {
  readonly text: string;
  readonly steps: number;
  readonly batch: number;
  readonly sequenceLength: number;
  readonly learningRate: number;
  readonly seed: number;
  readonly threads: number;
  readonly maxMemory: number;
}

const wholeLayers: Omit<TrainingSchedule, 'learningRate'> = {
  form: 'lora',
  regulariser: 0,
  finalFrom: 0,
  trace: [],
  init(modules) {
    for (const module of modules) {
      const { inFeatures: n, outFeatures: m } = module;
      module.rank = n;
      const identity = new Float32Array(n * n);
      for (let i = 0; i < n; i++) identity[i * n + i] = 1;
      place(module, 'loraA', [n, n], identity, true);
      place(module, 'loraB', [m, n], new Float32Array(m * n));
    }
  },
  before() {},
  after() {},
  ranks: (modules) => new Map(modules.map(({ name, rank }) => [name, rank])),
  factors: ({ rank, parameters }) => ({
    rank,
    loraA: parameters.get('loraA')!.values.slice(),
    loraB: parameters.get('loraB')!.values.slice(),
  }),
  state: () => null,
  restore() {},
};

/** Writes the updates of the best look as an adapter of full rank into `output`. */
export async function fullFineTuning(base: string, output: string, rules: FullFineTuning) {
  const started = performance.now();
  await using source = await openModelSource(base);
  const { model, weights } = source;
  const modules: TrainedModule[] = model.blocks.flatMap(({ index, sites }) =>
    sites.map(({ name, outFeatures, inFeatures }) => ({
      name,
      block: index,
      outFeatures,
      inFeatures,
      scale: 1,
      rank: 0,
      parameters: new Map(),
    })),
  );
  const tokenizer = await loadTokenizer(source.folder, model.shape.vocabSize);
  const text = await readTrainingText(tokenizer, [rules.text], rules.sequenceLength, endOfText(source.config));
  await using engine = await createEngine({ device: 'cpu', threads: rules.threads });
  await using spool = new Spool({ ramBytes: rules.maxMemory / 2 });
  const schedule = { ...wholeLayers, learningRate: rules.learningRate };
  schedule.init(modules);
  const forward = { model, engine, blas: createBlas(engine), spool, path: base };
  const trainer = new Trainer(forward, weights, modules, schedule, text, {
    ...rules,
    patience: 0,
    keptBytes: rules.maxMemory / 2,
  });
  while (!trainer.done) await trainer.step();
  await writeUpdates(output, modules, trainer.best!, { base, transposed: false, padRanks: false });
  return {
    parameters: modules.reduce((sum, { outFeatures, inFeatures }) => sum + outFeatures * inFeatures, 0),
    heldOut: trainer.progress.best!.nll,
    seconds: (performance.now() - started) / 1000,
  };
}
