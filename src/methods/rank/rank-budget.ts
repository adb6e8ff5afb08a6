/** What an adapter may cost, however it is written: `r=16`, `params=2.5M`, `pct=0.5%`, `bytes=20MB`, `bpw=0.25` (adapters.md, section 1). */
import { RecipeError } from '../../errors.ts';

export interface RankBudget {
  readonly kind: 'r' | 'params' | 'pct' | 'bytes' | 'bpw';
  /** In the kind's own unit: mean rank, parameters, percent of the adapted weights, bytes, bits a weight. */
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
const KINDS = ['r', 'params', 'pct', 'bytes', 'bpw'] as const;
const FACTORS: Readonly<Record<string, number>> = { '': 1, k: 1e3, M: 1e6, G: 1e9 };

/** @param parseBytes reads a size as every flag does; @param flag whose value it is */
export function parseRankBudget(text: string, parseBytes: (flag: string, text: string) => number, flag = '--budget'): RankBudget {
  const match = /^(\w+)=(.+)$/.exec(text.trim());
  const kind = KINDS.find((name) => name === match?.[1]);
  const refuse = (rule: string): never => {
    throw new RecipeError(`${flag} ${text}: ${rule}`);
  };
  if (match === null || kind === undefined) return refuse('one of r=16, params=2.5M, pct=0.5%, bytes=20MB, bpw=0.25 is expected');
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
  /** Most that may be spent. */
  readonly total: number;
  /** What one rank of a layer costs: 1 under `r`, else parameters. */
  cost(shape: AdaptedShape): number;
}

/** @throws RecipeError for a budget that buys not even one rank of the cheapest layer */
export function spendable(
  { kind, amount }: RankBudget,
  shapes: readonly AdaptedShape[],
  { parameterBits = PARAMETER_BITS, flag = '--budget' } = {},
): SpendableBudget {
  const weights = shapes.reduce((sum, { outFeatures, inFeatures }) => sum + outFeatures * inFeatures, 0);
  const total = {
    r: amount * shapes.length,
    params: amount,
    pct: (amount / 100) * weights,
    bytes: (amount * 8) / parameterBits,
    bpw: (amount * weights) / parameterBits,
  }[kind];
  const cost = kind === 'r' ? () => 1 : ({ outFeatures, inFeatures }: AdaptedShape) => outFeatures + inFeatures;
  const least = Math.min(...shapes.map(cost));
  if (total < least) {
    throw new RecipeError(
      `${flag} ${kind}=${amount}: is ${Math.floor(total)} ${kind === 'r' ? 'ranks' : 'parameters'}, and one rank takes at least ${least}`,
    );
  }
  return { total, cost };
}

/** The rank that all layers can have alike. */
export function uniformRank({ total, cost }: SpendableBudget, shapes: readonly AdaptedShape[]): number {
  return Math.floor(total / shapes.reduce((sum, shape) => sum + cost(shape), 0));
}
