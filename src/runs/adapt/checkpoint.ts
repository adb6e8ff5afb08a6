/** Training on disk: everything that a stopped run needs to go on to the same bytes. The newest checkpoint is whole, whenever the run ends. */
import { readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { openSafetensors } from '../../../formats/safetensors/reader.ts';
import { createSafetensorsSink } from '../../../formats/safetensors/writer.ts';
import { writeDurably } from '../../artifacts/durable.ts';
import { Parameter } from '../../compute/optim/parameter.ts';
import type { TrainedUpdate } from '../../methods/rank/training/schedule.ts';
import { dtypeOf, type PackedArray, pack, unpack } from './packed.ts';
import type { Progress, Trainer } from './train.ts';

interface Checkpoint {
  readonly progress: Progress;
  readonly schedule: unknown;
  readonly modules: readonly {
    readonly name: string;
    readonly rank: number;
    readonly scale: number;
    readonly parameters: readonly (Pick<Parameter, 'shape' | 'values' | 'first' | 'second' | 'born'> & {
      readonly name: string;
      readonly frozen?: Uint8Array;
    })[];
  }[];
  /** Updates at the best look. */
  readonly best: readonly (readonly [string, TrainedUpdate])[];
}

/** The checkpoint packed, beside the name of the file that its tensors are in. */
interface Stored {
  readonly file: string;
  readonly packed: unknown;
}

const STATE = 'training.json';

export async function saveCheckpoint(folder: string, trainer: Trainer): Promise<void> {
  const { progress, modules, schedule, best } = trainer;
  const checkpoint: Checkpoint = {
    progress,
    schedule: schedule.state(),
    modules: modules.map(({ name, rank, scale, parameters }) => ({
      name,
      rank,
      scale,
      parameters: [...parameters].map(([key, { shape, values, first, second, born, frozen }]) => ({
        name: key,
        shape,
        values,
        first,
        second,
        born,
        ...(frozen ? { frozen } : {}),
      })),
    })),
    best: [...(best ?? [])],
  };
  const tensors = new Map<string, PackedArray>();
  const packed = pack(checkpoint, tensors);
  const file = `training-${progress.step}.safetensors`;
  const previous = await readState(folder);
  await using sink = await createSafetensorsSink(
    join(folder, file),
    [...tensors].map(([name, values]) => ({ name, dtype: dtypeOf(values)!, shape: [values.length] })),
  );
  for (const [name, values] of tensors)
    await sink.write(name, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
  await sink.finalize();
  await writeDurably(join(folder, STATE), JSON.stringify({ file, packed } satisfies Stored));
  if (previous && previous.file !== file) await rm(join(folder, previous.file), { force: true });
}

async function readState(folder: string): Promise<Stored | undefined> {
  try {
    return JSON.parse(await readFile(join(folder, STATE), 'utf8')) as Stored;
  } catch {
    return undefined;
  }
}

/** Puts a trainer where the checkpoint was; false when there is none. */
export async function loadCheckpoint(folder: string, trainer: Trainer): Promise<boolean> {
  const state = await readState(folder);
  if (state === undefined) return false;
  await using source = await openSafetensors(join(folder, state.file));
  const { progress, schedule, modules, best } = (await unpack(state.packed, source)) as Checkpoint;
  for (const kept of modules) {
    const module = trainer.modules.find(({ name }) => name === kept.name)!;
    module.rank = kept.rank;
    module.scale = kept.scale;
    module.parameters.clear();
    for (const { name, shape, values, first, second, born, frozen } of kept.parameters) {
      const parameter = new Parameter(shape, values, born);
      parameter.first.set(first);
      parameter.second.set(second);
      parameter.frozen = frozen;
      module.parameters.set(name, parameter);
    }
  }
  trainer.schedule.restore(schedule);
  Object.assign(trainer.progress, progress);
  if (best.length > 0) trainer.best = new Map(best);
  return true;
}
