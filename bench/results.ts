/** Keeps a benchmark's rows as JSON and as a table, with the command that makes them and the machine they were made on. */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { arch, availableParallelism, cpus, platform } from 'node:os';
import { fileURLToPath } from 'node:url';

export type Row = Readonly<Record<string, number | string>>;

/** Writes bench/results/<name>.json and .md. Columns are those of the widest row; a missing cell stays empty. */
export async function writeResults(
  name: string,
  command: string,
  rows: readonly Row[],
  notes: readonly string[] = [],
): Promise<void> {
  const folder = fileURLToPath(new URL('results/', import.meta.url));
  await mkdir(folder, { recursive: true });
  const machine = `${platform()} ${arch()}, ${availableParallelism()} cores, ${cpus()[0]?.model.trim()}, Node ${process.version}`;
  await writeFile(`${folder}${name}.json`, `${JSON.stringify({ command, machine, rows, notes }, null, 2)}\n`);
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const cell = (value: number | string | undefined) => (typeof value === 'number' ? format(value) : (value ?? ''));
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  const table = [
    line(columns),
    line(columns.map(() => '---')),
    ...rows.map((row) => line(columns.map((column) => cell(row[column])))),
  ];
  await writeFile(
    `${folder}${name}.md`,
    `\`${command}\`\n\n${machine}\n\n${table.join('\n')}\n${notes.map((note) => `\n${note}\n`).join('')}`,
  );
}

/** Rows and notes of the last time, for a benchmark that measures some of its cases anew. */
export async function earlierResults(name: string): Promise<{ rows: Row[]; notes: string[] }> {
  const path = fileURLToPath(new URL(`results/${name}.json`, import.meta.url));
  const text = await readFile(path, 'utf8').catch(() => '{"rows":[],"notes":[]}');
  return JSON.parse(text) as { rows: Row[]; notes: string[] };
}

export async function earlierRows(name: string): Promise<Row[]> {
  return (await earlierResults(name)).rows;
}

function format(value: number): string {
  if (Number.isNaN(value)) return '';
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) < 0.01 ? value.toExponential(1) : value.toPrecision(5);
}
