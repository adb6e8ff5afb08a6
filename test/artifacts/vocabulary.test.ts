/** Vocabularies as large as those of real models. */
import { expect, it } from 'vitest';
import { uniteVocabularies, type Vocabulary, withTokens } from '../../src/artifacts/merge/vocabulary.ts';

const vocabulary = (count: number, extra: readonly string[]): Vocabulary => {
  const ordinary = new Map(Array.from({ length: count }, (_, i) => [`t${i}`, i]));
  for (const token of extra) ordinary.set(token, ordinary.size);
  return { ordinary, added: [], ids: ordinary, json: {} };
};

it('unites more tokens than a call may have arguments', () => {
  const models = [vocabulary(200_000, []), vocabulary(200_000, ['own'])];
  const united = uniteVocabularies(models, [200_064, 200_001]);
  expect(united.ids.get('own')).toBe(200_064);
  const { ids, appended } = withTokens(united, ['t7', 'asked'], 0);
  expect(ids.get('asked')).toBe(200_065);
  expect(appended.map(({ token, model }) => [token, model])).toEqual([
    ['own', 1],
    ['asked', undefined],
  ]);
});
