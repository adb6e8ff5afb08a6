/** Methods that train an adapter, by the name they have on the command line. */
import { adalora } from './adalora.ts';
import { increlora } from './increlora.ts';
import { lamda } from './lamda.ts';
import { lora } from './lora.ts';
import { mola } from './mola.ts';
import type { ScheduleOptions } from './options.ts';
import type { TrainingSchedule } from './schedule.ts';
import { snella } from './snella.ts';
import { triadaptlora } from './triadaptlora.ts';

type Schedule = (options: ScheduleOptions) => TrainingSchedule;

/** Without a step nothing moves: what was found as a start goes out as plain LoRA. */
const withSteps =
  (method: Schedule): Schedule =>
  (options) =>
    (options.steps > 0 ? method : lora)(options);

export const TRAINING_SCHEDULES = {
  uniform: lora,
  eva: lora,
  gora: lora,
  qerror: lora,
  lamda: withSteps(lamda),
  'lamda++': withSteps(lamda),
  adalora: withSteps(adalora),
  increlora: withSteps(increlora),
  triadaptlora: withSteps(triadaptlora),
  mola,
  snella,
} as const satisfies Record<string, Schedule>;
