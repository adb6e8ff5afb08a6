/** Merge methods that learn their coefficients on calibration text (merging.md, section 6): what can be set of them. */
import { RecipeError } from '../../errors.ts';
import type { NumberParameter, Parameters, ParameterValues } from './merger.ts';
import { resolveParameters } from './parameters.ts';

export interface LearnedMethod {
  readonly name: string;
  readonly formula: string;
  readonly reference: string;
  /** A coefficient per chunk after one per tensor. */
  readonly chunked: boolean;
  /** What the merged model is asked for: to say what every expert says of its text, or to be certain of it. */
  readonly objective: 'divergence' | 'entropy';
  readonly parameters: Parameters;
  /** Values of parameters that it has no choice of. */
  readonly fixed: Partial<LearnedValues>;
}

export type LearnedValues = ParameterValues<typeof ALL>;

const count = (summary: string, value: number): NumberParameter => ({
  type: 'number',
  summary,
  default: value,
  min: 0,
  integer: true,
});

/** Which text, and how prompts are answered that lack a response. */
export const TEXT_PARAMETERS = {
  samples: { type: 'number', summary: 'samples of each expert', default: 64, paper: 5, min: 1, integer: true },
  length: { type: 'number', summary: 'tokens of a sample, at most', default: 512, min: 2, integer: true },
  response_length: {
    type: 'number',
    summary: 'tokens that an expert writes for a prompt, at most',
    default: 128,
    min: 1,
    integer: true,
  },
  response_temperature: {
    type: 'number',
    summary: 'of the tokens an expert writes: 0 the likeliest each time, above it they are drawn',
    default: 0,
    min: 0,
  },
} as const satisfies Parameters;

export type TextValues = ParameterValues<typeof TEXT_PARAMETERS>;

/** Preset `paper` has its own rules where no `paper` value stands here: see docs/methods/expert-merging.md. */
const PARAMETERS = {
  ...TEXT_PARAMETERS,
  gamma: {
    type: 'number',
    summary: 'pull to the start; -1: by cross-validation from 32 samples on, else 0.8',
    default: -1,
    paper: 5,
    min: -1,
  },
  updates: count('updates of the first stage', 40),
  chunk_updates: count('updates of the second stage', 60),
  chunks: { type: 'number', summary: 'chunks per tensor on average; 0: by the number of samples', default: 0, paper: 1, min: 0 },
  sharpness: { type: 'number', summary: 'importance counts to this power in the budget of chunks', default: 1, min: 0 },
  hidden: { type: 'number', summary: 'weight of the hidden states after the middle block', default: 0.1, paper: 0, min: 0 },
  temperature: { type: 'number', summary: 'of the distributions compared', default: 1, above: 0 },
  start: {
    type: 'choice',
    summary: 'what coefficients start from; auto: the best of all but none',
    choices: ['auto', 'none', 'task-arithmetic', 'tsv-m', 'iso-c', 'regmean'],
    default: 'auto',
    paper: 'none',
  },
  passive: {
    type: 'choice',
    summary: 'norms, embeddings and head: of the base, or moved by the mean task vector; auto: the better at the start',
    choices: ['auto', 'base', 'mean'],
    default: 'auto',
    paper: 'base',
  },
} as const satisfies Parameters;

/** Of `adamerging` alone. */
const ENTROPY_PARAMETERS = {
  granularity: {
    type: 'choice',
    summary: 'a coefficient of each expert for every tensor, or one for all (task)',
    choices: ['tensor', 'task'],
    default: 'tensor',
  },
  trim: {
    type: 'number',
    summary: 'part of each task vector that is kept, its largest entries; below 1 the "++" form, published with 0.2',
    default: 1,
    above: 0,
    max: 1,
  },
} as const satisfies Parameters;

const ALL = { ...PARAMETERS, ...ENTROPY_PARAMETERS };

const FORMULA = 'start + sum_k alpha_k tau_k, alpha by descent on the divergence from every expert';

/** Every learned method, by its name on the command line. */
export const LEARNED = {
  'expert-merging': {
    name: 'expert-merging',
    formula: `${FORMULA}; one alpha per tensor`,
    reference: '2509.25712',
    chunked: false,
    objective: 'divergence',
    parameters: PARAMETERS,
    fixed: {},
  },
  'expert-merging++': {
    name: 'expert-merging++',
    formula: `${FORMULA}; then one per chunk, more where it matters`,
    reference: '2509.25712',
    chunked: true,
    objective: 'divergence',
    parameters: PARAMETERS,
    fixed: {},
  },
  adamerging: {
    name: 'adamerging',
    formula: 'base + sum_k lambda_k tau_k, one lambda per tensor, by descent on the entropy of what it predicts',
    reference: '2310.02575',
    chunked: false,
    objective: 'entropy',
    parameters: {
      ...TEXT_PARAMETERS,
      samples: { ...TEXT_PARAMETERS.samples, paper: 64 },
      updates: { ...PARAMETERS.updates, summary: 'updates', default: 100, paper: 1000 },
      ...ENTROPY_PARAMETERS,
    },
    fixed: { gamma: 0, hidden: 0, start: 'none', passive: 'base' },
  },
} as const satisfies Record<string, LearnedMethod>;

/** All values of a learned method: what was set, what it fixes, and the defaults of the rest. */
export function completeValues(
  method: LearnedMethod,
  own: Readonly<Record<string, unknown>>,
  preset: 'best' | 'paper',
): LearnedValues {
  const declared = { name: method.name, parameters: ALL };
  return { ...resolveParameters(declared, { shared: {} }, [], preset), ...method.fixed, ...own };
}

/** The learned method of that name, mergekit's spelling included; undefined for any other. Throws RecipeError for a near miss. */
export function learnedOf(name: string): LearnedMethod | undefined {
  const key = name.replaceAll('_', '-');
  if (Object.hasOwn(LEARNED, key)) return LEARNED[key as keyof typeof LEARNED];
  if (key.startsWith('expert-merging')) {
    throw new RecipeError(`--method ${name}: no such method; there are ${Object.keys(LEARNED).join(', ')}`);
  }
  return undefined;
}
