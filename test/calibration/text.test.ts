/** Reading text from files of several kinds. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parseTable } from '../../src/calibration/table.ts';
import { parseTextFile, readDocuments, readText } from '../../src/calibration/text.ts';
import { EnvironmentError, FormatError, RecipeError } from '../../src/errors.ts';

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'text-test-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

function file(name: string, content: string | Uint8Array): string {
  const path = join(folder, name);
  writeFileSync(path, content);
  return path;
}

async function documents(...names: string[]): Promise<string[]> {
  const all: string[] = [];
  for await (const document of readDocuments(names.map(parseTextFile))) all.push(document);
  return all;
}

describe('naming a file', () => {
  it.each([
    ['a.txt', { path: 'a.txt', kind: 'text' }],
    ['README', { path: 'README', kind: 'text' }],
    ['a:b.txt', { path: 'a:b.txt', kind: 'text' }],
    ['a.jsonl', { path: 'a.jsonl', kind: 'json-lines', field: 'text' }],
    ['a.jsonl:body', { path: 'a.jsonl', kind: 'json-lines', field: 'body' }],
    ['C:\\data\\a.JSONL', { path: 'C:\\data\\a.JSONL', kind: 'json-lines', field: 'text' }],
    ['C:\\data\\a.csv:my column', { path: 'C:\\data\\a.csv', kind: 'table', column: 'my column', separator: ',' }],
    ['d/a.tsv:t', { path: 'd/a.tsv', kind: 'table', column: 't', separator: '\t' }],
  ])('%s', (argument, expected) => {
    expect(parseTextFile(argument)).toEqual(expected);
  });

  it('asks for the column of a table', () => {
    expect(() => parseTextFile('a.csv')).toThrow(RecipeError);
  });
});

describe('plain text', () => {
  it('is one document a file, without its byte order mark, and several are joined by single spaces', async () => {
    const a = file('a.txt', '\ufeffOne\nline\n');
    const b = file('b.txt', 'naïve ☃ 😀');
    expect(await documents(a, b)).toEqual(['One\nline\n', 'naïve ☃ 😀']);
    expect(await readText([a, b].map(parseTextFile))).toBe('One\nline\n naïve ☃ 😀');
  });

  it('is refused when it is longer than one string can be, in one file or in all together', async () => {
    const ten = parseTextFile(file('ten.txt', '0123456789'));
    expect(await readText([ten, ten], 22)).toHaveLength(21);
    await expect(readText([ten], 9)).rejects.toThrow(/ten\.txt: more than the 9 characters/);
    await expect(readText([ten, ten], 21)).rejects.toThrow(RecipeError);
  });

  it('keeps characters that lie across two reads', async () => {
    const text = `x${'é☃😀'.repeat(40_000)}`;
    expect(await documents(file('long.txt', text))).toEqual([text]);
  });

  it.each([
    ['an invalid byte', [0x61, 0xff, 0x62]],
    ['a character cut off at the end', [0x61, 0xe2, 0x98]],
  ])('is refused when it is not UTF-8: %s', async (_, bytes) => {
    const failure = documents(file('bad.txt', Uint8Array.from(bytes)));
    await expect(failure).rejects.toThrow(FormatError);
    await expect(failure).rejects.toThrow(/\[utf-8\]/);
  });

  it.each(['', '  \n\t'])('is refused when there is none: %j', async (content) => {
    const path = file('empty.txt', content);
    await expect(readText([parseTextFile(path)])).rejects.toThrow(RecipeError);
    await expect(readText([parseTextFile(path)])).rejects.toThrow(/empty\.txt: no text/);
  });

  it('says in one line that a file is not there, or is a folder', async () => {
    await expect(documents(join(folder, 'nowhere.txt'))).rejects.toThrow(EnvironmentError);
    await expect(documents(join(folder, 'nowhere.txt'))).rejects.toThrow(/nowhere\.txt: cannot be read \(ENOENT\)/);
    await expect(documents(folder)).rejects.toThrow(RecipeError);
  });
});

describe('JSON lines', () => {
  it('give one document a line, from the field `text` or the one that is named', async () => {
    const path = file('a.jsonl', '{"text":"one\\ntwo","body":"b1"}\r\n\n{"text":"","body":"b2"}\n{"body":"b3","text":"three"}');
    expect(await documents(path)).toEqual(['one\ntwo', 'three']);
    expect(await documents(`${path}:body`)).toEqual(['b1', 'b2', 'b3']);
  });

  it('take a chat when its field is named', async () => {
    const path = file('chat.jsonl', '{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Yes?"}]}');
    expect(await documents(`${path}:messages`)).toEqual(['Hi\nYes?']);
    await expect(documents(path)).rejects.toThrow(
      /line 1 has no field "text"; its fields are messages\. Name one: .*\[json-line-field-missing\]/,
    );
  });

  it.each([
    ['{"text":"a"}\n{"text":', 'json-line'],
    ['{"text":"a"}\n[1]', 'json-line-object'],
    ['{"text":"a"}\nnull', 'json-line-object'],
    ['{"text":"a"}\n{"Text":"b"}', 'json-line-field-missing'],
    ['{"text":"a"}\n{"text":7}', 'json-line-field-type'],
  ])('name the line that is wrong: %j', async (content, rule) => {
    const failure = documents(file('wrong.jsonl', content));
    await expect(failure).rejects.toMatchObject({ rule });
    await expect(failure).rejects.toThrow(/line 2 /);
  });

  it('do not find a field that only every object has', async () => {
    await expect(documents(`${file('proto.jsonl', '{"text":"a"}')}:toString`)).rejects.toMatchObject({
      rule: 'json-line-field-missing',
    });
  });
});

describe('tables', () => {
  it('give the cells of one column', async () => {
    const path = file('a.csv', 'id,body\r\n1,"He said ""yes"", twice"\r\n2,"two\nlines"\r\n3,\r\n\r\n4,last');
    expect(await documents(`${path}:body`)).toEqual(['He said "yes", twice', 'two\nlines', 'last']);
    const tabs = file('a.tsv', 'id\tbody\n1\ta, b\n');
    expect(await documents(`${tabs}:body`)).toEqual(['a, b']);
  });

  it('name the columns there are when one is missing', async () => {
    const failure = documents(`${file('b.csv', 'id,body\n1,x\n')}:text`);
    await expect(failure).rejects.toThrow(RecipeError);
    await expect(failure).rejects.toThrow(/no column "text"; it has "id", "body"/);
  });

  it.each([
    ['id,body\n1,x\n2\n', 'table-row-short', /line 3 has 1 cells/],
    ['id,body\n1,"x"y\n', 'table-quote', /line 2: text after a closing quote/],
    ['id,body\n1,"x\n\n', 'table-quote', /opens with a quote in line 2 never ends/],
  ])('name the line that is wrong: %j', async (content, rule, message) => {
    const failure = documents(`${file('wrong.csv', content)}:body`);
    await expect(failure).rejects.toMatchObject({ rule });
    await expect(failure).rejects.toThrow(message);
  });

  it('give back any cells, however the file is cut into parts', async () => {
    const cell = fc.string({ unit: fc.constantFrom('a', '"', ',', '\n', '\r', ' ', 'é'), maxLength: 5 });
    const table = fc.array(fc.array(cell, { minLength: 1, maxLength: 4 }), { minLength: 1, maxLength: 5 });
    const quote = (text: string) => `"${text.replaceAll('"', '""')}"`;
    await fc.assert(
      fc.asyncProperty(table, fc.integer({ min: 1, max: 7 }), fc.constantFrom('\n', '\r\n'), async (rows, size, end) => {
        // A carriage return at the end of a row's last cell is not told from the row's own.
        const written = rows.map((row) => row.map((text, i) => (i === row.length - 1 ? text.replace(/\r+$/, '') : text)));
        const content = written.map((row) => row.map(quote).join(',') + end).join('');
        async function* parts() {
          for (let i = 0; i < content.length; i += size) yield content.slice(i, i + size);
        }
        const read: (readonly string[])[] = [];
        for await (const { cells } of parseTable('t', parts(), ',')) read.push(cells);
        expect(read).toEqual(written);
      }),
    );
  });
});
