/** Which options of a request go together. Nothing is parsed and ignored: an option that the method asked for does not read is refused. */
import { RecipeError } from '../../errors.ts';
import { flag } from '../recipe-fields.ts';
import type { QuantizeRecipe, QuantizeRequest, QuantizerName } from './recipe.ts';

type Key = keyof QuantizeRecipe;

/** Who reads an option: methods, and the one preset under which they do. */
interface Readers {
  readonly methods: readonly QuantizerName[];
  readonly preset?: QuantizeRecipe['preset'];
}

const LEARNED: readonly QuantizerName[] = ['slim-llm-plus', 'autoround'];
const CALIBRATED: readonly QuantizerName[] = ['gptq', 'slim-llm', ...LEARNED];
const ALLOCATING: readonly QuantizerName[] = ['rtn', 'slim-llm', ...LEARNED];

const READERS: Partial<Record<Key, Readers>> = {
  actOrder: { methods: ['gptq'], preset: 'paper' },
  staticGroups: { methods: ['gptq'], preset: 'paper' },
  symmetric: { methods: ['rtn', 'gptq'], preset: 'paper' },
  salience: { methods: ['slim-llm', 'slim-llm-plus'], preset: 'paper' },
  lambdaSalience: { methods: ['slim-llm'], preset: 'paper' },
  dampening: { methods: ['gptq', 'slim-llm', 'slim-llm-plus'], preset: 'paper' },
  trueSequential: { methods: ['gptq', 'slim-llm'], preset: 'paper' },
  calibration: { methods: CALIBRATED },
  samples: { methods: CALIBRATED },
  sequenceLength: { methods: CALIBRATED },
  bpw: { methods: ALLOCATING, preset: 'best' },
  size: { methods: ALLOCATING, preset: 'best' },
  runtimeMemory: { methods: ALLOCATING, preset: 'best' },
  maxLoss: { methods: ['slim-llm', ...LEARNED], preset: 'best' },
  transform: { methods: CALIBRATED, preset: 'best' },
  alpha: { methods: CALIBRATED, preset: 'best' },
  sensitivity: { methods: ['slim-llm', ...LEARNED], preset: 'best' },
  without: { methods: ['rtn', 'gptq', 'slim-llm', ...LEARNED], preset: 'best' },
  steps: { methods: LEARNED },
  joint: { methods: ALLOCATING, preset: 'best' },
};

/** What text is read by. */
const TEXT_KEYS: readonly Key[] = ['calibration', 'samples', 'sequenceLength'];

const BUDGETS = ['bits', 'bpw', 'size', 'runtimeMemory', 'maxLoss'] as const satisfies readonly Key[];

/** Throws RecipeError naming the option that does not fit, and what it fits. An option asked for at its default value fits everything. */
export function checkRecipe(recipe: QuantizeRecipe, request: QuantizeRequest, defaults: Partial<QuantizeRecipe>): void {
  for (const [key, { methods, preset }] of Object.entries(READERS) as [Key, Readers][]) {
    const asked = request[key] !== undefined && JSON.stringify(request[key]) !== JSON.stringify(defaults[key]);
    if (!asked) continue;
    // Branches are made on text, whatever the codes were made on; whether a plan has any is seen when it is read.
    if (TEXT_KEYS.includes(key) && (recipe.lowrank !== undefined || recipe.plan !== undefined)) continue;
    if (!methods.includes(recipe.method)) {
      throw new RecipeError(`${flag(key)}: --method ${recipe.method} does not use it; it goes with ${methods.join(', ')}`);
    }
    if (preset !== undefined && preset !== recipe.preset) {
      throw new RecipeError(`${flag(key)}: preset ${recipe.preset} does not use it; it goes with --preset ${preset}`);
    }
  }
  checkBudget(recipe);
  checkLowRank(recipe, request);
  checkGroupSize(recipe);
  if (recipe.plan !== undefined && request.groupSize !== undefined && recipe.embeddings === 'float') {
    throw new RecipeError(`--group-size ${recipe.groupSize}: the plan says the size of every group; give --group-size or --plan`);
  }
  if (recipe.formats.includes('gptq') && recipe.embeddings !== 'float') {
    throw new RecipeError(
      `--embeddings ${recipe.embeddings}: the gptq layout keeps embeddings in float; drop the flag or the format`,
    );
  }
  if (recipe.formats.includes('gptq') && mixesWidths(recipe)) {
    throw new RecipeError(
      `--format gptq: the layout has one width per module and ${recipe.method} mixes widths inside a module; use --method gptq, or --format safetensors`,
    );
  }
  if (recipe.formats.includes('gptq') && request.transform !== undefined && !['auto', 'none'].includes(recipe.transform)) {
    throw new RecipeError(`--transform ${recipe.transform}: the gptq layout has no place for it; use --transform none`);
  }
  if (!recipe.compact && !recipe.formats.includes('onnx')) {
    throw new RecipeError('--no-compact: says how ONNX files store codes, and no ONNX is written');
  }
  if (request.onnxContainer !== undefined && !recipe.formats.includes('onnx')) {
    throw new RecipeError(
      `--onnx-container ${recipe.onnxContainer}: says which operands onnxruntime holds, and no ONNX is written`,
    );
  }
  if (recipe.runtimeMemory !== undefined && !recipe.formats.includes('onnx')) {
    throw new RecipeError('--runtime-memory: counts operands of onnxruntime, and no ONNX is written; use --size or --bpw');
  }
}

function checkGroupSize({ groupSize, method, preset, plan, without, formats }: QuantizeRecipe): void {
  if (groupSize !== 'auto') return;
  const fail = (why: string) => new RecipeError(`--group-size auto: ${why}; give one of 32, 64, 128, 256`);
  if (plan !== undefined)
    throw new RecipeError('--group-size auto: the plan says the size of every group; give --group-size or --plan');
  if (preset !== 'best') throw fail(`preset ${preset} has one size everywhere`);
  if (!ALLOCATING.includes(method)) throw fail(`--method ${method} has one size everywhere`);
  if (without.includes('allocation')) throw fail('sizes are chosen by the allocation, which --without leaves out');
  if (formats.includes('gptq')) throw fail('the gptq layout has one size');
}

function checkLowRank({ lowrank, plan, maxLoss, joint, without }: QuantizeRecipe, request: QuantizeRequest): void {
  if (lowrank !== undefined && maxLoss !== undefined)
    throw new RecipeError(`--lowrank ${lowrank}: --max-loss is met by widths alone; give a budget in bits or bytes`);
  if (joint && (lowrank === undefined || plan !== undefined))
    throw new RecipeError('--joint: shares one budget out over widths and ranks; it goes with --lowrank, and not with --plan');
  if (joint && without.includes('allocation'))
    throw new RecipeError('--joint: shares a budget out, and --without allocation leaves that out');
  if (joint && /^r=/.test(lowrank!.trim()))
    throw new RecipeError(`--lowrank ${lowrank}: with --joint, ranks are counted by bpw=, bytes=, params= or pct=`);
  if (request.lowrankBits !== undefined && lowrank === undefined)
    throw new RecipeError('--lowrank-bits: goes with --lowrank; a plan says how wide its branches are');
  const alone = (['lowrankOuter', 'lowrankInputs'] as const).find((key) => request[key] !== undefined);
  if (alone !== undefined && lowrank === undefined && plan === undefined)
    throw new RecipeError(`${flag(alone)}: goes with --lowrank, which says what branches may cost`);
}

/** Whether widths differ inside a module, whatever the budget. */
export function mixesWidths({ method, preset }: Pick<QuantizeRecipe, 'method' | 'preset'>): boolean {
  return method === 'slim-llm' || method === 'slim-llm-plus' || (method === 'autoround' && preset === 'best');
}

function checkBudget(recipe: QuantizeRecipe): void {
  const given = BUDGETS.filter((key) => recipe[key] !== undefined);
  if (recipe.plan !== undefined && given.length > 0) {
    const [key] = given;
    throw new RecipeError(`${flag(key)} ${recipe[key]}: the plan says every width; give ${flag(key)} or --plan`);
  }
  if (recipe.plan === undefined && given.length === 0) throw new RecipeError('--bits: a budget is required, e.g. --bits 2');
  if (given.length > 1) {
    throw new RecipeError(`${given.map(flag).join(', ')}: one budget at a time; give one of ${BUDGETS.map(flag).join(', ')}`);
  }
  const { bits, method, preset } = recipe;
  const uniform = preset === 'paper' || method === 'gptq' || recipe.without.includes('allocation');
  if (uniform && given.length > 0 && bits === undefined) {
    throw new RecipeError(`${flag(given[0])}: widths are not allocated here, so the budget is a width; use --bits`);
  }
  if (uniform && bits !== undefined && !Number.isInteger(bits)) {
    const why = preset === 'paper' ? 'under preset paper' : method === 'gptq' ? 'with --method gptq' : 'without allocation';
    throw new RecipeError(`--bits ${bits}: must be a whole number ${why}`);
  }
  if (
    preset === 'paper' &&
    (method === 'slim-llm' || method === 'slim-llm-plus') &&
    bits !== undefined &&
    (bits < 2 || bits > 7)
  ) {
    throw new RecipeError(
      `--bits ${bits}: ${method} under preset paper mixes widths N-1, N and N+1, so N is 2..7; for ${bits} bits use --preset best`,
    );
  }
}
