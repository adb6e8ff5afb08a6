/** Experts of one base share its network and its vocabulary: equal settings may be spelled differently, different ones are named. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { requireSameConfig } from '../../../src/artifacts/merge/same-config.ts';
import { requireSameVocabulary } from '../../../src/artifacts/merge/same-vocabulary.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';

const scratch = scratchFolder();
const llama = {
  model_type: 'llama',
  hidden_size: 64,
  num_attention_heads: 4,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  vocab_size: 41,
};

describe('configurations agree', () => {
  it.each<[string, object, object]>([
    [
      'when they are equal but for the vocabulary and the name',
      llama,
      { ...llama, vocab_size: 43, _name_or_path: 'x', torch_dtype: 'float16' },
    ],
    ['when one leaves the head size to be computed', { ...llama, head_dim: 16, num_key_value_heads: 4 }, llama],
    [
      'when the rotation is said in the newer way',
      llama,
      { ...llama, rope_theta: undefined, rope_parameters: { rope_type: 'default', rope_theta: 10000 } },
    ],
    [
      'when a scaling is said in the older way',
      { ...llama, rope_scaling: { type: 'linear', factor: 2 } },
      { ...llama, rope_scaling: { rope_type: 'linear', factor: 2 } },
    ],
    [
      'when a window is there but not used',
      { ...llama, sliding_window: null },
      { ...llama, sliding_window: 4096, use_sliding_window: false },
    ],
  ])('%s', (_, expert, base) => {
    requireSameConfig('expert', expert as Record<string, unknown>, base as Record<string, unknown>);
  });

  it.each<[object, RegExp]>([
    [
      { num_attention_heads: 8 },
      /^expert: is not of the base's make: num_attention_heads is 8, the base's 4; num_key_value_heads is 8/,
    ],
    [{ head_dim: 32 }, /head_dim is 32, the base's 16/],
    [{ rope_theta: 500000 }, /rope_theta is 500000, the base's 10000/],
    [{ rope_scaling: { rope_type: 'yarn', factor: 4 } }, /rope scaling is .*yarn.*, the base's null/],
    [{ rms_norm_eps: 1e-6 }, /rms_norm_eps is 0.000001, the base's 0.00001/],
    [{ attention_bias: true }, /attention_bias is true, the base's false/],
  ])('not with %j', (changes, message) => {
    expect(() => requireSameConfig('expert', { ...llama, ...changes }, llama)).toThrow(message);
  });
});

describe('vocabularies agree', () => {
  const folder = (vocab: object, added: object[] = []): string => {
    const path = scratch.folder();
    writeFileSync(join(path, 'tokenizer.json'), JSON.stringify({ model: { vocab }, added_tokens: added }));
    return path;
  };
  const base = folder({ a: 0, b: 1 }, [{ id: 2, content: '</s>' }]);

  it('when every id has one meaning, however it is stored, or a folder has no tokenizer', async () => {
    await requireSameVocabulary(folder({ b: 1, a: 0, '</s>': 2 }), base);
    await requireSameVocabulary(
      folder(
        [
          ['a', -1],
          ['b', -2],
        ],
        [{ id: 2, content: '</s>' }],
      ),
      base,
    );
    await requireSameVocabulary(scratch.folder(), base);
  });

  it('not when an id means something else, is new or is gone', async () => {
    const other = folder({ a: 0, c: 1 }, [{ id: 3, content: '<tool>' }]);
    await expect(requireSameVocabulary(other, base)).rejects.toThrow(
      /differs from the base's in 3 ids: 1 is "c", the base's "b"; 2 is nothing, the base's "<\/s>"; 3 is "<tool>", the base's nothing/,
    );
  });
});
