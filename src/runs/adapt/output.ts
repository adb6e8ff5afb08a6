/** What training made, written in the form it has: factors as a PEFT folder, routed experts, or an update of few non-zeros. */
import { type AdapterModule, padded, writeAdapter } from '../../artifacts/peft.ts';
import { type RoutedModule, writeRouted } from '../../artifacts/routed-adapter.ts';
import { type DeltaModule, writeDelta } from '../../artifacts/sparse-delta.ts';
import type { TrainedModule, TrainedUpdate } from '../../methods/rank/training/schedule.ts';

export interface UpdatesFolder {
  /** As `base_model_name_or_path`. */
  readonly base: string;
  /** Layers of the base are stored (in, out). */
  readonly transposed: boolean;
  /** Every layer at the largest rank, with zeros. */
  readonly padRanks: boolean;
}

/** Writes the updates of all layers, which are of one form, into `folder`. */
export async function writeUpdates(
  folder: string,
  modules: readonly TrainedModule[],
  updates: ReadonlyMap<string, TrainedUpdate>,
  { base, transposed, padRanks }: UpdatesFolder,
): Promise<void> {
  const factors: AdapterModule[] = [];
  const routed: RoutedModule[] = [];
  const deltas: DeltaModule[] = [];
  for (const { name, outFeatures, inFeatures } of modules) {
    const update = updates.get(name)!;
    if ('routed' in update) routed.push({ name, outFeatures, inFeatures, ...update });
    else if ('indices' in update) deltas.push({ name, outFeatures, inFeatures, ...update });
    else factors.push({ name, ...update });
  }
  if (routed.length > 0) return await writeRouted(folder, { base, routed, transposed });
  if (deltas.length > 0) return await writeDelta(folder, { base, deltas, transposed });
  const most = Math.max(...factors.map(({ rank }) => rank));
  await writeAdapter(folder, {
    base,
    modules: padRanks ? factors.map((module) => ({ ...module, ...padded(module, most) })) : factors,
    saved: [],
    transposed,
  });
}
