/** Methods that train an adapter, by the name they have on the command line. */
import { adalora } from './adalora.ts';
import { lora } from './lora.ts';
import type { ScheduleOptions } from './options.ts';
import type { TrainingSchedule } from './schedule.ts';

export const TRAINING_SCHEDULES = {
  uniform: lora,
  eva: lora,
  gora: lora,
  qerror: lora,
  'lamda++': lora,
  adalora,
} as const satisfies Record<string, (options: ScheduleOptions) => TrainingSchedule>;
