/** Training on disk: everything that a stopped run needs to go on to the same bytes. The newest checkpoint is whole, whenever the run ends. */
import { readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { openSafetensors } from '../formats/safetensors/reader.ts';
import { createSafetensorsSink } from '../formats/safetensors/writer.ts';
import type { Progress, Trainer } from './adapt-train.ts';
import { writeDurably } from './artifacts/durable.ts';
import { Parameter } from './compute/optim/parameter.ts';
import type { TrainedFactors } from './methods/rank/training/schedule.ts';

interface Checkpoint {
  /** File of the tensors. */
  readonly file: string;
  readonly progress: Progress;
  readonly schedule: unknown;
  readonly modules: readonly {
    readonly name: string;
    readonly rank: number;
    readonly scale: number;
    readonly parameters: readonly {
      readonly name: string;
      readonly shape: readonly number[];
      /** Absent where every value has its own, which is a tensor. */
      readonly born?: number;
      /** Some values stay; which is a tensor. */
      readonly frozen: boolean;
    }[];
  }[];
  readonly best: readonly { readonly name: string; readonly rank: number; readonly turned: boolean }[];
}

const STATE = 'training.json';
const PARTS = ['values', 'first', 'second'] as const;

export async function saveCheckpoint(folder: string, trainer: Trainer): Promise<void> {
  const { progress, modules, schedule, best } = trainer;
  const file = `training-${progress.step}.safetensors`;
  const tensors = new Map<string, Float32Array>();
  for (const { name, parameters } of modules) {
    for (const [key, parameter] of parameters) {
      for (const part of PARTS) tensors.set(`${name}/${key}/${part}`, parameter[part]);
      if (parameter.frozen) tensors.set(`${name}/${key}/frozen`, Float32Array.from(parameter.frozen));
      // Counts of steps, exact in float32.
      if (typeof parameter.born !== 'number') tensors.set(`${name}/${key}/born`, Float32Array.from(parameter.born));
    }
  }
  for (const [name, { rank, loraA, loraB, magnitude }] of best ?? []) {
    if (magnitude) tensors.set(`${name}/best/magnitude`, magnitude);
    if (rank === 0) continue;
    tensors.set(`${name}/best/loraA`, loraA);
    tensors.set(`${name}/best/loraB`, loraB);
  }
  const used = [...tensors].filter(([, values]) => values.length > 0);
  const previous = await readState(folder);
  await using sink = await createSafetensorsSink(
    join(folder, file),
    used.map(([name, { length }]) => ({ name, dtype: 'F32', shape: [length] })),
  );
  for (const [name, values] of used) await sink.write(name, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
  await sink.finalize();
  const state: Checkpoint = {
    file,
    progress,
    schedule: schedule.state(),
    modules: modules.map(({ name, rank, scale, parameters }) => ({
      name,
      rank,
      scale,
      parameters: [...parameters].map(([key, { shape, born, frozen }]) => ({
        name: key,
        shape,
        ...(typeof born === 'number' ? { born } : {}),
        frozen: frozen !== undefined,
      })),
    })),
    best: [...(best ?? [])].map(([name, { rank, magnitude }]) => ({ name, rank, turned: magnitude !== undefined })),
  };
  await writeDurably(join(folder, STATE), JSON.stringify(state));
  if (previous && previous.file !== file) await rm(join(folder, previous.file), { force: true });
}

async function readState(folder: string): Promise<Checkpoint | undefined> {
  try {
    return JSON.parse(await readFile(join(folder, STATE), 'utf8')) as Checkpoint;
  } catch {
    return undefined;
  }
}

/** Puts a trainer where the checkpoint was; false when there is none. */
export async function loadCheckpoint(folder: string, trainer: Trainer): Promise<boolean> {
  const state = await readState(folder);
  if (state === undefined) return false;
  await using source = await openSafetensors(join(folder, state.file));
  const read = async (name: string, length: number): Promise<Float32Array> => {
    if (length === 0) return new Float32Array();
    const { data } = await source.read(name);
    return new Float32Array(data.slice().buffer);
  };
  for (const kept of state.modules) {
    const module = trainer.modules.find(({ name }) => name === kept.name)!;
    module.rank = kept.rank;
    module.scale = kept.scale;
    module.parameters.clear();
    for (const { name, shape, born, frozen } of kept.parameters) {
      const length = shape.reduce((product, dim) => product * dim, 1);
      const [values, first, second] = [
        await read(`${kept.name}/${name}/values`, length),
        ...(await Promise.all(PARTS.slice(1).map((part) => read(`${kept.name}/${name}/${part}`, length)))),
      ];
      const births = born ?? Int32Array.from(await read(`${kept.name}/${name}/born`, length));
      const parameter = new Parameter(shape, values, births);
      parameter.first.set(first);
      parameter.second.set(second);
      if (frozen) parameter.frozen = Uint8Array.from(await read(`${kept.name}/${name}/frozen`, length));
      module.parameters.set(name, parameter);
    }
  }
  trainer.schedule.restore(state.schedule);
  Object.assign(trainer.progress, state.progress);
  const best = new Map<string, TrainedFactors>();
  for (const { name, rank, turned } of state.best) {
    const module = trainer.modules.find((candidate) => candidate.name === name)!;
    best.set(name, {
      rank,
      loraA: await read(`${name}/best/loraA`, rank * module.inFeatures),
      loraB: await read(`${name}/best/loraB`, rank * module.outFeatures),
      ...(turned ? { magnitude: await read(`${name}/best/magnitude`, module.outFeatures) } : {}),
    });
  }
  if (best.size > 0) trainer.best = best;
  return true;
}
