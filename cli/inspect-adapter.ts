/** An adapter's layers for people. */
import type { ConvertOutcome } from '../src/adapt-convert.ts';
import { renderPairs, renderTable } from './ui/table.ts';

export function renderAdapter({ layout, modules, parameters }: NonNullable<ConvertOutcome['adapter']>): string {
  const ranks = modules.map(({ rank }) => rank);
  const pairs: [string, string][] = [
    [
      'adapter',
      `${layout}, ${modules.length} layers${ranks.length === 0 ? '' : `, rank ${Math.min(...ranks)} to ${Math.max(...ranks)}`}`,
    ],
    ['parameters', `${parameters}`],
  ];
  const rows = modules.map(({ name, outFeatures, inFeatures, rank }) => [
    name,
    `${outFeatures} x ${inFeatures}`,
    rank,
    rank * (outFeatures + inFeatures),
  ]);
  return `${renderPairs(pairs)}\n\n${renderTable(['module', 'shape', 'rank', 'parameters'], rows)}`;
}
