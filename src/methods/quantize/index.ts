/** The quantizers. Commands, help, documentation and the conformance suite read these lists. */
import { gptqBest, slimLlmBest } from './best/quantizers.ts';
import { rtnBest } from './best/rtn-best.ts';
import { gptq } from './gptq.ts';
import { autoround, autoroundBest, slimLlmPlus, slimLlmPlusBest } from './learned/quantizers.ts';
import type { Quantizer } from './quantizer.ts';
import { rtn } from './rtn.ts';
import { slimLlm } from './slim-llm/slim-llm.ts';

/** Every quantizer as published, by the name it has on the command line and in recipes: preset `paper`. */
export const QUANTIZERS = {
  rtn,
  gptq,
  'slim-llm': slimLlm,
  'slim-llm-plus': slimLlmPlus,
  autoround,
} as const satisfies Record<string, Quantizer>;

/** The same under preset `best`. */
export const BEST_QUANTIZERS = {
  rtn: rtnBest,
  gptq: gptqBest,
  'slim-llm': slimLlmBest,
  'slim-llm-plus': slimLlmPlusBest,
  autoround: autoroundBest,
} as const satisfies Record<keyof typeof QUANTIZERS, Quantizer>;

export function quantizerOf(method: keyof typeof QUANTIZERS, preset: 'paper' | 'best'): Quantizer {
  return preset === 'best' ? BEST_QUANTIZERS[method] : QUANTIZERS[method];
}
