/** An adapter's layers for people. */
import type { ConvertOutcome } from '../src/runs/adapt/convert.ts';
import { renderPairs, renderTable } from './ui/table.ts';

export function renderAdapter({ layout, modules, parameters }: NonNullable<ConvertOutcome['adapter']>): string {
  const ranks = modules.map(({ rank }) => rank);
  const pairs: [string, string][] = [
    [
      'adapter',
      `${layout}, ${modules.length} layers${ranks.length === 0 || layout === 'delta' ? '' : `, rank ${Math.min(...ranks)} to ${Math.max(...ranks)}`}`,
    ],
    [layout === 'delta' ? 'non-zeros' : 'parameters', `${parameters}`],
  ];
  const parts = (module: (typeof modules)[number]): readonly (string | number)[] => {
    if (layout === 'delta') return [`${((100 * module.parameters) / (module.outFeatures * module.inFeatures)).toFixed(3)} %`];
    if (!module.routed) return [module.rank];
    const { routing, experts, topK, rank, sharedA, sharedExpert } = module.routed;
    const taken =
      routing === 'topk' ? `best ${topK}` : `all${sharedA ? ', one A' : ''}${sharedExpert ? ', one for every token' : ''}`;
    return [rank, experts, taken];
  };
  const rows = modules.map((module) => [
    module.name,
    `${module.outFeatures} x ${module.inFeatures}`,
    ...parts(module),
    module.parameters,
  ]);
  const heads =
    layout === 'delta' ? ['density'] : layout === 'mola' || layout === 'tmoe' ? ['rank', 'experts', 'through'] : ['rank'];
  return `${renderPairs(pairs)}\n\n${renderTable(['module', 'shape', ...heads, layout === 'delta' ? 'non-zeros' : 'parameters'], rows)}`;
}
