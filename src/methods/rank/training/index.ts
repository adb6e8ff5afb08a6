/** Methods that train an adapter, by the name they have on the command line. */
import { adalora } from './adalora.ts';
import { increlora } from './increlora.ts';
import { lamda } from './lamda.ts';
import { lora } from './lora.ts';
import type { ScheduleOptions } from './options.ts';
import type { TrainingSchedule } from './schedule.ts';
import { triadaptlora } from './triadaptlora.ts';

export const TRAINING_SCHEDULES = {
  uniform: lora,
  eva: lora,
  gora: lora,
  qerror: lora,
  // Without a step there is no core to train: the spectral start goes out as plain LoRA.
  lamda: (options) => (options.steps > 0 ? lamda : lora)(options),
  'lamda++': (options) => (options.steps > 0 ? lamda : lora)(options),
  adalora,
  increlora,
  triadaptlora,
} as const satisfies Record<string, (options: ScheduleOptions) => TrainingSchedule>;
