/** Training on disk: everything that a stopped run needs to go on to the same bytes. The newest checkpoint is whole, whenever the run ends. */
import { readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { openSafetensors } from '../../../formats/safetensors/reader.ts';
import { createSafetensorsSink } from '../../../formats/safetensors/writer.ts';
import { writeDurably } from '../../artifacts/durable.ts';
import { Parameter } from '../../compute/optim/parameter.ts';
import type { TrainedUpdate } from '../../methods/rank/training/schedule.ts';
import type { Progress, Trainer } from './train.ts';

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
  /** Updates at the best look: plain fields as they are, the lengths of those that are arrays, which are tensors. */
  readonly best: readonly {
    readonly name: string;
    readonly fields: Readonly<Record<string, unknown>>;
    readonly arrays: Readonly<Record<string, number>>;
  }[];
}

/** Numbers of 4 bytes: a tensor of the checkpoint. */
type Stored = Float32Array | Int32Array;
const isStored = (value: unknown): value is Stored => value instanceof Float32Array || value instanceof Int32Array;

const STATE = 'training.json';
const PARTS = ['values', 'first', 'second'] as const;

export async function saveCheckpoint(folder: string, trainer: Trainer): Promise<void> {
  const { progress, modules, schedule, best } = trainer;
  const file = `training-${progress.step}.safetensors`;
  const tensors = new Map<string, Stored>();
  for (const { name, parameters } of modules) {
    for (const [key, parameter] of parameters) {
      for (const part of PARTS) tensors.set(`${name}/${key}/${part}`, parameter[part]);
      if (parameter.frozen) tensors.set(`${name}/${key}/frozen`, Float32Array.from(parameter.frozen));
      // Counts of steps, exact in float32.
      if (typeof parameter.born !== 'number') tensors.set(`${name}/${key}/born`, Float32Array.from(parameter.born));
    }
  }
  for (const [name, update] of best ?? []) {
    for (const [key, value] of Object.entries(update)) if (isStored(value)) tensors.set(`${name}/best/${key}`, value);
  }
  const used = [...tensors].filter(([, values]) => values.length > 0);
  const previous = await readState(folder);
  await using sink = await createSafetensorsSink(
    join(folder, file),
    used.map(([name, values]) => ({ name, dtype: values instanceof Int32Array ? 'I32' : 'F32', shape: [values.length] })),
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
    best: [...(best ?? [])].map(([name, update]) => {
      const entries = Object.entries(update);
      return {
        name,
        fields: Object.fromEntries(entries.filter(([, value]) => !isStored(value))),
        arrays: Object.fromEntries(entries.flatMap(([key, value]) => (isStored(value) ? [[key, value.length]] : []))),
      };
    }),
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
  const best = new Map<string, TrainedUpdate>();
  for (const { name, fields, arrays } of state.best) {
    const update: Record<string, unknown> = { ...fields };
    for (const [key, length] of Object.entries(arrays)) {
      const values = await read(`${name}/best/${key}`, length);
      update[key] = key === 'indices' ? new Int32Array(values.buffer) : values;
    }
    best.set(name, update as unknown as TrainedUpdate);
  }
  if (best.size > 0) trainer.best = best;
  return true;
}
