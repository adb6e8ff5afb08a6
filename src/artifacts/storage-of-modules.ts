/** What an artifact's quantized modules cost, in model order. */
import type { Model } from '../model/model.ts';
import { type ModuleStorage, type Storage, summarizeStorage } from './accounting.ts';
import type { StoredModules } from './stored-modules.ts';

/** @param floatBits width of the float type, which counts when nothing is quantized */
export async function storageOfModules(model: Model, stored: StoredModules, floatBits = 0): Promise<Storage> {
  const sites = model.blocks.flatMap((block) => block.sites.map((site) => site.name));
  const linears: ModuleStorage[] = [];
  for (const name of sites) if (stored.modules.has(name)) linears.push(await stored.storage(name));
  const embeddings: ModuleStorage[] = [];
  for (const name of stored.modules.keys()) if (!sites.includes(name)) embeddings.push(await stored.storage(name));
  return summarizeStorage(linears, embeddings, floatBits);
}
