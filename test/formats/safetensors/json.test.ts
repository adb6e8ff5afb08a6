import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type Json, JsonError, parseJson } from '../../../formats/safetensors/json.ts';

/** Maps back to what JSON.parse gives. */
function plain(value: Json): unknown {
  if (value instanceof Map) return Object.fromEntries([...value].map(([key, item]) => [key, plain(item)]));
  return Array.isArray(value) ? value.map(plain) : value;
}

function kindOf(text: string): string {
  try {
    parseJson(text);
    return 'accepted';
  } catch (error) {
    if (error instanceof JsonError) return error.kind;
    throw error;
  }
}

function accepts(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

describe('parseJson', () => {
  it('reads what JSON.stringify writes', () => {
    const values = fc.jsonValue({ maxDepth: 5 }).filter((value) => !JSON.stringify(value).includes('__proto__'));
    fc.assert(
      fc.property(values, fc.constantFrom(0, 1, 3), (value, indent) => {
        const text = JSON.stringify(value, null, indent);
        expect(plain(parseJson(text))).toEqual(JSON.parse(text));
      }),
      { numRuns: 500 },
    );
  });

  it('accepts and refuses what JSON.parse accepts and refuses, after any small damage', () => {
    const text = '{"a\\n\\u0062": [1, -0.5e+3, true, false, null, "x\\\\"], "c": {}}';
    const damage = fc.tuple(
      fc.nat(text.length),
      fc.nat(2),
      fc.constantFrom('', '"', ',', '}', ']', '{', '\\', '0', '-', '.', 'e', ' ', '\n', 'u'),
    );
    fc.assert(
      fc.property(fc.array(damage, { minLength: 1, maxLength: 2 }), (damages) => {
        const broken = damages.reduce((t, [at, drop, insert]) => t.slice(0, at) + insert + t.slice(at + drop), text);
        expect(kindOf(broken) === 'accepted').toBe(accepts(broken));
      }),
      { numRuns: 3000 },
    );
  });

  it('refuses numbers JSON does not have', () => {
    for (const text of ['01', '+1', '.5', '1.', '1e', 'NaN', 'Infinity', '0x10', '--1']) expect(kindOf(text)).toBe('syntax');
  });

  it('refuses keys given twice at any depth, and tells the depth', () => {
    expect(() => parseJson('{"a":{"b":1,"b":2}}')).toThrow(expect.objectContaining({ kind: 'duplicate-key', depth: 2 }));
    expect(() => parseJson('{"a":1,"\\u0061":2}')).toThrow(expect.objectContaining({ kind: 'duplicate-key', depth: 1 }));
    expect(kindOf('{"a":{"b":1},"c":{"b":2}}')).toBe('accepted');
  });

  it('refuses "__proto__" as a key and lets it be a value', () => {
    expect(kindOf('{"__proto__":1}')).toBe('reserved-key');
    expect(parseJson('"__proto__"')).toBe('__proto__');
  });

  it('refuses half a surrogate pair and takes a whole one', () => {
    expect(kindOf('"\\ud83d"')).toBe('syntax');
    expect(parseJson('"\\ud83d\\ude00"')).toBe('😀');
  });

  it('refuses endless nesting without exhausting the stack', () => {
    expect(kindOf('['.repeat(1_000_000))).toBe('syntax');
    expect(kindOf('{"a":'.repeat(1_000_000))).toBe('syntax');
  });

  it('says where and what it expected', () => {
    expect(() => parseJson('{"a" 1}')).toThrow('expected ":" at character 5, found "1}"');
    expect(() => parseJson('[1')).toThrow('expected "," or "]" at character 2, found the end');
  });
});
