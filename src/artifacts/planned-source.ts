/** Quantized layers as a plan says that they will be, without their codes: enough to lay an artifact out and to know its size. */
import { shapeOfKind } from '../methods/quantize/best/prepared-input.ts';
import { factorStorage } from '../methods/quantize/low-rank.ts';
import type { SitePlan } from '../methods/quantize/quantizer.ts';
import type { LinearSite } from '../model/model.ts';
import type { QuantizedGrid } from './planes.ts';
import type { QuantizedSource } from './quantized-source.ts';

const NOTHING = new Float32Array(0);

/** @param free inputs whose order costs nothing, @param plans a sorted input is taken to be sorted for good: as none is whose columns already lie in order */
export function plannedSource(
  plans: Iterable<readonly [LinearSite, SitePlan]>,
  free: ReadonlySet<string> = new Set(),
): QuantizedSource {
  const grids = new Map([...plans].map(([site, plan]) => [site.name, gridOf(site, plan, free.has(site.input))]));
  return {
    has: (name) => grids.has(name),
    readGrid: async (name) => grids.get(name)!,
    read: async (name) => {
      throw new Error(`${name} is planned, and has no codes. This is a bug in pcomp.`);
    },
  };
}

function gridOf(
  { outFeatures, inFeatures }: LinearSite,
  { groupSize, bits, transform, rank, rankBits }: SitePlan,
  free: boolean,
): QuantizedGrid {
  const shape = transform && shapeOfKind(transform, groupSize, inFeatures);
  return {
    outFeatures,
    inFeatures,
    groupSize,
    bits: Uint8Array.from(bits),
    scales: NOTHING,
    zeroPoints: new Uint8Array(0),
    scaleDtype: 'F16',
    ...(shape && {
      transform: {
        ...(shape.permuted && !free && { order: Uint32Array.from({ length: inFeatures }, (_, k) => inFeatures - 1 - k) }),
        ...(shape.signed && { signs: new Uint8Array(inFeatures) }),
        hadamard: shape.hadamard,
      },
    }),
    ...(rank !== undefined && { lowRank: { rank, dtype: factorStorage(rankBits), loraA: NOTHING, loraB: NOTHING } }),
  };
}
