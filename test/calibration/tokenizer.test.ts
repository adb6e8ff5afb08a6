/** A model's tokenizer: files that are refused, and text that may be cut. */
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Tokenizer as Reference } from '@huggingface/tokenizers';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cutText, cuttingOf, splitLongWords } from '../../src/calibration/text-pieces.ts';
import { loadTokenizer, Tokenizer } from '../../src/calibration/tokenizer.ts';
import { FormatError, UnsupportedError } from '../../src/errors.ts';

type Json = Record<string, unknown>;

const BOS = {
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  pair: [],
  special_tokens: { '<s>': { id: '<s>', ids: [0], tokens: ['<s>'] } },
};

/** Byte-level BPE, as GPT-2 and Llama 3 have it: every printable character that is needed here, some merges, a BOS template. */
function byteLevel(): Json {
  const characters = [...'abcdef.,1\u0120\u010a'];
  const merges = [
    ['a', 'b'],
    ['ab', 'c'],
    ['\u0120', 'a'],
    ['\u0120', 'ab'],
    ['\u010a', '\u010a'],
    ['.', '\u010a'],
  ];
  const tokens = ['<s>', ...characters, ...merges.map((pair) => pair.join(''))];
  return {
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, use_regex: true },
    post_processor: BOS,
    decoder: { type: 'ByteLevel' },
    added_tokens: [{ id: 0, content: '<s>', special: true, normalized: false }],
    model: {
      type: 'BPE',
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges: merges.map((pair) => pair.join(' ')),
    },
  };
}

/** Sentencepiece-style BPE, as Llama 2 has it: a space mark before the text and for every space, no words. */
function sentencePiece(): Json {
  const mark = '\u2581';
  const merges = [
    ['a', 'b'],
    [mark, 'a'],
    [mark, mark],
    [mark, 'ab'],
    ['b', '\n'],
    ['ab', 'c'],
    [mark + mark, 'ab'],
  ];
  const tokens = ['<unk>', '<s>', mark, ...'abc.\n', ...merges.map((pair) => pair.join(''))];
  return {
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'Prepend', prepend: mark },
        { type: 'Replace', pattern: { String: ' ' }, content: mark },
      ],
    },
    pre_tokenizer: null,
    post_processor: null,
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: mark }, content: ' ' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    added_tokens: [
      { id: 0, content: '<unk>', special: true, normalized: false },
      { id: 1, content: '<s>', special: true, normalized: false },
    ],
    model: {
      type: 'BPE',
      unk_token: '<unk>',
      fuse_unk: true,
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges,
    },
  };
}

const encodeWhole = (json: Json, text: string) => new Reference(json, {}).encode(text).ids;

describe('encoding', () => {
  it('puts the template around the text, once', () => {
    const tokenizer = new Tokenizer('t', byteLevel(), {}, 100);
    expect([tokenizer.prefix, tokenizer.suffix]).toEqual([[0], []]);
    expect([...tokenizer.encode('abc abc')]).toEqual(encodeWhole(byteLevel(), 'abc abc'));
    expect([...tokenizer.encode('')]).toEqual([0]);
  });

  it.each([
    ['byte-level', byteLevel, 'abcdef.,1 \n', 'line-break'],
    ['sentencepiece-style', sentencePiece, 'aabbc. \nZ', 'space'],
  ] as const)('of %s text in pieces gives the tokens of the whole', (_, make, alphabet, cutting) => {
    expect(cuttingOf(make(), {})).toBe(cutting);
    const text = fc
      .array(fc.constantFrom(...alphabet, ...alphabet, '<s>', 'a b', 'Z Z', 'ab \n', 'b\na', 'c\n\n'), {
        maxLength: 60,
        size: 'max',
      })
      .map((parts) => parts.join(''));
    const whole = new Reference(make(), {});
    let cuts = 0;
    fc.assert(
      fc.property(text, fc.integer({ min: 1, max: 9 }), (sample, size) => {
        cuts += Math.max(0, [...cutText(sample, cutting, size)].length - 1);
        expect([...new Tokenizer('t', make(), {}, 100, size).encode(sample)]).toEqual(whole.encode(sample).ids);
      }),
      { numRuns: 300 },
    );
    expect(cuts).toBeGreaterThan(100);
  });

  it('splits the words of sentencepiece-style text only when no merge reaches over their start', () => {
    const json = sentencePiece();
    expect(splitLongWords(json)['pre_tokenizer']).not.toBeNull();
    const model = json['model'] as { vocab: Json; merges: string[][] };
    const over = {
      ...json,
      model: { ...model, vocab: { ...model.vocab, 'b\u2581': 90 }, merges: [...model.merges, ['b', '\u2581']] },
    };
    expect(splitLongWords(over)).toBe(over);
    expect(cuttingOf(over, {})).toBe('none');
    expect([...new Tokenizer('t', over, {}, 100, 1).encode('ab ab')]).toEqual(encodeWhole(over, 'ab ab'));
  });

  it.each([
    ['an added token with a line break', { added_tokens: [{ id: 0, content: 'a\nb' }] }],
    ['an added token that swallows space', { added_tokens: [{ id: 0, content: '<s>', rstrip: true }] }],
    ['a space before every text', { pre_tokenizer: { type: 'ByteLevel', add_prefix_space: true } }],
    [
      'words of an unknown pattern',
      {
        pre_tokenizer: {
          type: 'Sequence',
          pretokenizers: [
            { type: 'Split', pattern: { Regex: '.*' }, behavior: 'Isolated' },
            { type: 'ByteLevel', use_regex: false },
          ],
        },
      },
    ],
    ['a normalizer that looks at neighbours', { normalizer: { type: 'Replace', pattern: { String: 'a\n' }, content: 'b' } }],
  ])('does not cut text of a tokenizer with %s', (_, change) => {
    expect(cuttingOf({ ...byteLevel(), ...change }, {})).toBe('none');
  });

  it('refuses an id that the model has no embedding for, and text without a token', () => {
    expect(() => new Tokenizer('t', byteLevel(), {}, 3).encode('c')).toThrow(
      /token id 3, but the model's vocabulary has 3 .*\[token-id-beyond-vocabulary\]/,
    );
    const wordPiece = {
      ...byteLevel(),
      post_processor: null,
      pre_tokenizer: { type: 'WhitespaceSplit' },
      decoder: null,
      model: { type: 'WordPiece', vocab: { a: 0 } },
    };
    expect(() => new Tokenizer('t', wordPiece, {}, 3).encode('zz')).toThrow(/\[token-unknown\]/);
  });

  it('is undone by decoding', () => {
    const tokenizer = new Tokenizer('t', byteLevel(), { clean_up_tokenization_spaces: false }, 100);
    expect(tokenizer.decode(tokenizer.encode('abc, def.\n\n ab'))).toBe('abc, def.\n\n ab');
    expect(tokenizer.decode([])).toBe('');
  });
});

describe('a tokenizer file', () => {
  let folder = '';
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'tokenizer-test-'));
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  async function loading(content: string | Json, config?: string) {
    const own = mkdtempSync(join(folder, 'm-'));
    writeFileSync(join(own, 'tokenizer.json'), typeof content === 'string' ? content : JSON.stringify(content));
    if (config !== undefined) writeFileSync(join(own, 'tokenizer_config.json'), config);
    return loadTokenizer(own, 100);
  }

  const withModel = (change: Json): Json => ({ ...byteLevel(), model: { ...(byteLevel()['model'] as Json), ...change } });
  const without = (section: string): Json => Object.fromEntries(Object.entries(byteLevel()).filter(([key]) => key !== section));

  it('loads without tokenizer_config.json, and without the type that old files leave out', async () => {
    expect([...(await loading(byteLevel())).encode('ab')]).toEqual(encodeWhole(byteLevel(), 'ab'));
    const old = withModel({});
    delete (old['model'] as Json)['type'];
    expect([...(await loading(old)).encode('ab')]).toEqual(encodeWhole(byteLevel(), 'ab'));
  });

  it.each<[string, string | Json, string]>([
    ['cut off', '{"model": {', 'tokenizer-json'],
    ['a list', '[]', 'tokenizer-object'],
    ['without a model', without('model'), 'tokenizer-model-missing'],
    ['without a decoder section', without('decoder'), 'tokenizer-section-missing'],
    ['with a decoder that is a string', { ...byteLevel(), decoder: 'ByteLevel' }, 'tokenizer-section'],
    ['without a vocabulary', withModel({ vocab: undefined }), 'tokenizer-vocab'],
    ['with an empty vocabulary', withModel({ vocab: {} }), 'tokenizer-vocab'],
    ['with an id that is not a whole number', withModel({ vocab: { a: 1.5 } }), 'tokenizer-vocab-id'],
    ['with a negative id', withModel({ vocab: { a: -1 } }), 'tokenizer-vocab-id'],
    ['with an id twice', withModel({ vocab: { a: 1, b: 1 } }), 'tokenizer-vocab-duplicate'],
    ['without merges', withModel({ merges: undefined }), 'tokenizer-merges'],
    ['with a merge of three', withModel({ merges: ['a b c'] }), 'tokenizer-merges'],
    ['with a merge to no token', withModel({ merges: ['a e'] }), 'tokenizer-merge-token'],
    ['without added tokens', without('added_tokens'), 'tokenizer-added-tokens'],
    ['with an added token without an id', { ...byteLevel(), added_tokens: [{ content: '<s>' }] }, 'tokenizer-added-tokens'],
    ['with a Unigram vocabulary without scores', withModel({ type: 'Unigram', vocab: [['a']] }), 'tokenizer-vocab'],
    [
      'with a pattern that is no regular expression',
      { ...byteLevel(), pre_tokenizer: { type: 'Split', pattern: { Regex: '[' }, behavior: 'Isolated' } },
      'tokenizer-content',
    ],
    [
      'with a template that is no list',
      { ...byteLevel(), post_processor: { type: 'TemplateProcessing', single: 'x', pair: [], special_tokens: {} } },
      'tokenizer-content',
    ],
  ])('is refused when it is %s', async (_, content, rule) => {
    const failure = loading(content);
    await expect(failure).rejects.toThrow(FormatError);
    await expect(failure).rejects.toMatchObject({ rule });
  });

  it('is refused by name when its kind is not supported', async () => {
    await expect(loading(withModel({ type: 'WordLevel' }))).rejects.toThrow(UnsupportedError);
    await expect(loading({ ...byteLevel(), pre_tokenizer: { type: 'Mystery' } })).rejects.toThrow(
      /Unknown PreTokenizer type: Mystery/,
    );
  });

  it('is refused when it or its config cannot be read', async () => {
    await expect(loadTokenizer(join(folder, 'nowhere'), 100)).rejects.toMatchObject({ rule: 'tokenizer-missing' });
    await expect(loading(byteLevel(), '{')).rejects.toMatchObject({ rule: 'tokenizer-json' });
  });
});

const data = process.env['PCOMP_TEST_DATA'] ?? '../shared/data';
const available = existsSync(join(data, 'README.md'));
if (!available) console.warn(`tokenizers of real models are not tested: ${data} is absent (PCOMP_TEST_DATA)`);

describe.skipIf(!available)('the tokenizers of real models', () => {
  it.each([
    ['lab/base', 'lab/text/python.eval.txt', 2048],
    ['stories260k', 'text/tinystories.valid.30k.txt', 512],
  ])('%s: in pieces as in one, and back to the text', async (model, text, vocabSize) => {
    const folder = join(data, model);
    const read = (name: string): Json => JSON.parse(readFileSync(join(folder, name), 'utf8'));
    const sample = readFileSync(join(data, text), 'utf8').slice(0, 30_000);
    const tokenizer = await loadTokenizer(folder, vocabSize);
    const ids = tokenizer.encode(sample);
    expect([...ids]).toEqual(new Reference(read('tokenizer.json'), read('tokenizer_config.json')).encode(sample).ids);
    const pieces = new Tokenizer(folder, read('tokenizer.json'), read('tokenizer_config.json'), vocabSize, 500);
    expect([...pieces.encode(sample)]).toEqual([...ids]);
    expect(tokenizer.decode(ids)).toBe(sample);
    expect([ids[0], tokenizer.prefix]).toEqual([1, [1]]);
  });
});
