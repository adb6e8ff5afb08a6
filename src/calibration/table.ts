/** Tables as text: rows of cells, quoted as RFC 4180 says, a part of the file at a time. */
import { FormatError } from '../errors.ts';

/** One row; `line` is where it starts, from 1. */
export interface TableRow {
  readonly cells: readonly string[];
  readonly line: number;
}

/**
 * Parses `parts` of a table. A cell in double quotes may hold separators, line breaks and doubled quotes; rows end with LF or CRLF.
 * Throws FormatError `table-quote` when a quoted cell goes on after its closing quote, or never ends.
 */
export async function* parseTable(path: string, parts: AsyncIterable<string>, separator: ',' | '\t'): AsyncGenerator<TableRow> {
  let cells: string[] = [];
  let cell = '';
  let state: 'start' | 'plain' | 'quoted' | 'closed' = 'start';
  let line = 1;
  let rowLine = 1;
  let quoteLine = 1;

  for await (const part of parts) {
    let from = 0; // start of the run of ordinary characters not yet in `cell`
    for (let i = 0; i < part.length; i++) {
      const char = part[i];
      if (state === 'quoted') {
        if (char === '\n') line++;
        if (char !== '"') continue;
        cell += part.slice(from, i);
        state = 'closed';
        from = i + 1;
      } else if (char === '"' && state === 'closed') {
        cell += '"';
        state = 'quoted';
        from = i + 1;
      } else if (char === '"' && state === 'start') {
        state = 'quoted';
        quoteLine = line;
        from = i + 1;
      } else if (char === separator || char === '\n') {
        cell += part.slice(from, i);
        from = i + 1;
        if (char === '\n' && cell.endsWith('\r')) cell = cell.slice(0, -1);
        cells.push(cell);
        cell = '';
        state = 'start';
        if (char === '\n') {
          yield { cells, line: rowLine };
          cells = [];
          rowLine = ++line;
        }
      } else if (state === 'start') {
        state = 'plain';
      } else if (state === 'closed' && char !== '\r') {
        throw new FormatError(path, 'table-quote', `line ${line}: text after a closing quote; a quote inside a cell is doubled`);
      }
    }
    cell += part.slice(from);
  }
  if (state === 'quoted') {
    throw new FormatError(path, 'table-quote', `the cell that opens with a quote in line ${quoteLine} never ends`);
  }
  if (cell !== '' || cells.length > 0 || state !== 'start') yield { cells: [...cells, cell], line: rowLine };
}
