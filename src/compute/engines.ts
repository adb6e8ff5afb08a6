/** Every engine, by the name it has on the command line and in recipes. */
import type { Engine } from './engine.ts';
import { createEngine, type EngineOptions } from './ort.ts';
import { createTfjsEngine } from './tfjs.ts';

export const ENGINES = { ort: createEngine, tfjs: createTfjsEngine } as const satisfies Record<
  string,
  (options: EngineOptions) => Promise<Engine>
>;
export type EngineName = keyof typeof ENGINES;
