/** Tables for a terminal: columns padded, numbers to the right. */

export type Cell = string | number;

/** Renders rows under a header; a column whose cells are all numeric is aligned right. */
export function renderTable(header: readonly string[], rows: readonly (readonly Cell[])[]): string {
  const cells = [header, ...rows].map((row) => row.map(String));
  const widths = header.map((_, column) => Math.max(...cells.map((row) => row[column].length)));
  const right = header.map(
    (_, column) => rows.length > 0 && rows.every((row) => /^[-+]?[\d.,]+(e[-+]?\d+)?\s?(%|[kMGT]?B)?$/.test(String(row[column]))),
  );
  const line = (row: readonly string[]) =>
    row
      .map((cell, column) => (right[column] ? cell.padStart(widths[column]) : cell.padEnd(widths[column])))
      .join('  ')
      .trimEnd();
  const rule = widths.map((width) => '-'.repeat(width));
  return [line(cells[0]), line(rule), ...cells.slice(1).map(line)].join('\n');
}

/** `label  value` lines, labels padded. */
export function renderPairs(pairs: readonly (readonly [string, Cell])[]): string {
  const width = Math.max(...pairs.map(([label]) => label.length));
  return pairs.map(([label, value]) => `${label.padEnd(width)}  ${value}`).join('\n');
}
