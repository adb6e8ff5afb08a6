/** The coefficients of a learned merge as a picture: a panel per expert, a row per block, a column per kind of layer, a stripe per chunk. */
import type { MergePlan } from '../methods/merge/merge-plan.ts';

/** Pixels. */
const CELL = { width: 46, height: 19 };
const LABELS = 46;
const GAP = 28;
const TOP = 74;
const LEGEND = { width: 240, height: 12, below: 22 };

/** Kinds of layer, as they come in a block, and blocks, as they come in the model. */
interface Grid {
  readonly columns: readonly string[];
  readonly rows: readonly string[];
  /** By row and column: the tensor there. */
  readonly tensors: ReadonlyMap<string, string>;
}

/** An SVG document: the same plan, the same bytes. */
export function coefficientMap({ method, experts, start, tensors }: MergePlan): string {
  const grid = gridOf(Object.keys(tensors));
  const all = Object.values(tensors).flatMap(({ coefficients }) => coefficients.flat());
  const most = all.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
  const panel = grid.columns.length * CELL.width;
  const width = LABELS + experts.length * (panel + GAP);
  const height = TOP + grid.rows.length * CELL.height + LEGEND.below + LEGEND.height + 34;
  const parts = [
    text(8, 20, 14, `${method}: coefficients${start.scale === 0 ? '' : `, on top of ${start.scale} x ${start.method}`}`),
    ...grid.rows.map((row, r) => text(8, TOP + r * CELL.height + 13, 11, row)),
    ...experts.flatMap((expert, k) => {
      const left = LABELS + k * (panel + GAP);
      return [
        text(left, 42, 13, expert),
        ...grid.columns.map((column, c) => text(left + (c + 0.5) * CELL.width, TOP - 8, 10, short(column), 'middle')),
        ...cells(grid, tensors, k, left, most),
      ];
    }),
    legend(LABELS, TOP + grid.rows.length * CELL.height + LEGEND.below, most),
  ];
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="sans-serif">
<rect width="${width}" height="${height}" fill="#ffffff"/>
${parts.join('\n')}
</svg>
`;
}

function cells(grid: Grid, tensors: MergePlan['tensors'], expert: number, left: number, most: number): string[] {
  return grid.rows.flatMap((row, r) =>
    grid.columns.flatMap((column, c) => {
      const name = grid.tensors.get(`${row} ${column}`);
      if (name === undefined) return [];
      const { bounds, coefficients } = tensors[name];
      const own = coefficients[expert];
      const size = bounds.at(-1)!;
      const [x, y] = [left + c * CELL.width, TOP + r * CELL.height];
      // As wide as the chunk's part of the tensor.
      const stripes = own.map((value, s) => {
        const [from, to] = [bounds[s] / size, bounds[s + 1] / size];
        const fill = colorOf(value, most);
        return `<rect x="${round(x + from * (CELL.width - 1))}" y="${y}" width="${round((to - from) * (CELL.width - 1))}" height="${CELL.height - 1}" fill="${fill}"/>`;
      });
      const frame = `<rect x="${x}" y="${y}" width="${CELL.width - 1}" height="${CELL.height - 1}" fill="none" stroke="#999999" stroke-width="0.7"/>`;
      const told = own.map((value) => value.toPrecision(3)).join(' ');
      return [`<g><title>${escaped(name)}: ${told}</title>${stripes.join('')}${frame}</g>`];
    }),
  );
}

/** `model.layers.3.mlp.up_proj.weight` is row `3`, column `up_proj`. */
function gridOf(names: readonly string[]): Grid {
  const rows: string[] = [];
  const columns: string[] = [];
  const tensors = new Map<string, string>();
  for (const name of names) {
    const found = /\.(\d+)\.(.*?)(?:\.weight)?$/.exec(name);
    const [row, column] = found ? [found[1], found[2]] : ['', name];
    if (!rows.includes(row)) rows.push(row);
    if (!columns.includes(column)) columns.push(column);
    tensors.set(`${row} ${column}`, name);
  }
  return { rows, columns, tensors };
}

/** `self_attn.q_proj` -> `q`. */
function short(column: string): string {
  return column.slice(column.lastIndexOf('.') + 1).replace(/_proj$/, '');
}

/** Blue below 0, red above, white at it; the same scale on both sides. */
function colorOf(value: number, most: number): string {
  const strength = most === 0 ? 0 : Math.abs(value) / most;
  const [r, g, b] = value < 0 ? [33, 102, 172] : [178, 24, 43];
  const mixed = [r, g, b].map((channel) => Math.round(255 + (channel - 255) * strength));
  return `rgb(${mixed.join(',')})`;
}

function legend(x: number, y: number, most: number): string {
  const steps = 24;
  const width = LEGEND.width / steps;
  const bars = Array.from({ length: steps }, (_, i) => {
    const value = most * ((2 * (i + 0.5)) / steps - 1);
    return `<rect x="${x + i * width}" y="${y}" width="${width}" height="${LEGEND.height}" fill="${colorOf(value, most)}"/>`;
  });
  const marks = [-most, 0, most].map((value, i) =>
    text(x + (i * LEGEND.width) / 2, y + LEGEND.height + 14, 10, value === 0 ? '0' : value.toPrecision(2), 'middle'),
  );
  return [...bars, ...marks].join('');
}

function text(x: number, y: number, size: number, content: string, anchor = 'start'): string {
  return `<text x="${round(x)}" y="${y}" font-size="${size}" text-anchor="${anchor}" fill="#222222">${escaped(content)}</text>`;
}

function escaped(content: string): string {
  return content.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}

function round(value: number): number {
  return Math.round(value * 100) / 100;
}
