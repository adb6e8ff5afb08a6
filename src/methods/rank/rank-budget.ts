/** What an adapter may cost, however it is written: `r=16`, `params=2.5M`, `pct=0.5%`, `bytes=20MB`, `bpw=0.25`, `experts=160`, `density=0.05` (adapters.md, section 1). */
import { RecipeError } from '../../errors.ts';

export interface RankBudget {
  readonly kind: 'r' | 'params' | 'pct' | 'bytes' | 'bpw' | 'experts' | 'density';
  /** In the kind's own unit: mean rank, parameters, percent of the adapted weights, bytes, bits a weight, experts of all blocks, part of the adapted weights. */
  readonly amount: number;
}

/** A layer's size; its rank k costs `k (outFeatures + inFeatures)` parameters. */
export interface AdaptedShape {
  readonly name: string;
  readonly outFeatures: number;
  readonly inFeatures: number;
}

/** Bits of an adapter's parameter as PEFT stores it. */
const PARAMETER_BITS = 32;
const RANK_KINDS = ['r', 'params', 'pct', 'bytes', 'bpw'] as const;
/** Experts and non-zeros are budgets of the methods that have them. */
export const ADAPTER_KINDS = [...RANK_KINDS, 'experts', 'density'] as const;
const EXAMPLES: Readonly<Record<RankBudget['kind'], string>> = {
  r: 'r=16',
  params: 'params=2.5M',
  pct: 'pct=0.5%',
  bytes: 'bytes=20MB',
  bpw: 'bpw=0.25',
  experts: 'experts=160',
  density: 'density=0.05',
};
const FACTORS: Readonly<Record<string, number>> = { '': 1, k: 1e3, M: 1e6, G: 1e9 };

/** @param parseBytes reads a size as every flag does; @param flag whose value it is */
export function parseRankBudget(
  text: string,
  parseBytes: (flag: string, text: string) => number,
  flag = '--budget',
  kinds: readonly RankBudget['kind'][] = RANK_KINDS,
): RankBudget {
  const match = /^(\w+)=(.+)$/.exec(text.trim());
  const kind = kinds.find((name) => name === match?.[1]);
  const refuse = (rule: string): never => {
    throw new RecipeError(`${flag} ${text}: ${rule}`);
  };
  if (match === null || kind === undefined) return refuse(`one of ${kinds.map((name) => EXAMPLES[name]).join(', ')} is expected`);
  const [, , written] = match;
  if (kind === 'bytes') return { kind, amount: parseBytes(`${flag} bytes`, written) };
  const number = /^(\d+(?:\.\d+)?|\.\d+)(k|M|G|%)?$/.exec(written);
  const suffix = number?.[2] ?? '';
  const fits = suffix === '' || (kind === 'pct' ? suffix === '%' : kind === 'params' && suffix !== '%');
  if (number === null || !fits)
    return refuse(`${kind} takes a number${kind === 'pct' ? ' in percent' : kind === 'params' ? ', with k, M or G' : ''}`);
  const amount = Number(number[1]) * (FACTORS[suffix] ?? 1);
  if (!(amount > 0)) return refuse('a budget above 0 is needed');
  return { kind, amount };
}

/** A budget in the unit that ranks are counted in. */
export interface SpendableBudget {
  readonly unit: 'ranks' | 'parameters' | 'experts';
  /** Most that may be spent. */
  readonly total: number;
  /** What one rank of a layer costs: 1 under `r`, else parameters. */
  cost(shape: AdaptedShape): number;
}

/** @throws RecipeError for a budget that buys not even one rank of the cheapest layer */
export function spendable(
  { kind, amount }: RankBudget,
  shapes: readonly AdaptedShape[],
  {
    parameterBits = PARAMETER_BITS,
    flag = '--budget',
    least: smallest,
    parametersOf = (length: number) => length,
  }: {
    readonly parameterBits?: number;
    readonly flag?: string;
    readonly least?: number;
    /** What one component's part of a factor costs, in parameters; for factors that are more than their values. */
    readonly parametersOf?: (length: number) => number;
  } = {},
): SpendableBudget {
  const weights = shapes.reduce((sum, { outFeatures, inFeatures }) => sum + outFeatures * inFeatures, 0);
  const total = {
    r: amount * shapes.length,
    params: amount,
    pct: (amount / 100) * weights,
    bytes: (amount * 8) / parameterBits,
    bpw: (amount * weights) / parameterBits,
    experts: amount,
    density: amount * weights,
  }[kind];
  const cost =
    kind === 'r' ? () => 1 : ({ outFeatures, inFeatures }: AdaptedShape) => parametersOf(outFeatures) + parametersOf(inFeatures);
  const least = smallest ?? Math.min(...shapes.map(cost));
  const unit = kind === 'r' ? 'ranks' : kind === 'experts' ? 'experts' : 'parameters';
  if (total < least) {
    throw new RecipeError(
      `${flag} ${kind}=${amount}: is ${Math.floor(total)} ${unit}, and ${smallest === undefined ? 'one rank takes' : 'it takes'} at least ${least}`,
    );
  }
  return { unit, total, cost };
}

/** The rank that all layers can have alike. */
export function uniformRank({ total, cost }: SpendableBudget, shapes: readonly AdaptedShape[]): number {
  return Math.floor(total / shapes.reduce((sum, shape) => sum + cost(shape), 0));
}
