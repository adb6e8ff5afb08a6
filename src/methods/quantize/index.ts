/** The quantizers. Commands, help, documentation and the conformance suite read this list. */
import { gptq } from './gptq.ts';
import type { Quantizer } from './quantizer.ts';
import { rtn } from './rtn.ts';
import { slimLlm } from './slim-llm/slim-llm.ts';

/** Every quantizer, by the name it has on the command line and in recipes. */
export const QUANTIZERS = { rtn, gptq, 'slim-llm': slimLlm } as const satisfies Record<string, Quantizer>;
