/** The untouched transformers.js loads what pcomp writes, and says the same as onnxruntime. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { AutoModelForCausalLM, AutoTokenizer, env, type Tensor } from '@huggingface/transformers';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openModelSource } from '../../src/artifacts/model-source.ts';
import { loadTokenizer } from '../../src/calibration/tokenizer.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { generate } from '../../src/generate.ts';
import { quantize, quantizeRecipe } from '../../src/index.ts';

const base = fileURLToPath(new URL('../../fixtures/lab/base', import.meta.url));
const text = fileURLToPath(new URL('../../fixtures/lab/text/python.train.txt', import.meta.url));
const PROMPT = 'def read(self, size):\n    """Read';

env.allowRemoteModels = false;

describe.each([
  { dtype: 'q2', options: { bits: 2 } },
  { dtype: 'q2', options: { bits: 2, embeddings: 8 } },
  { dtype: 'q4', options: { bits: 4, method: 'gptq' } },
] as const)('an artifact with $options', ({ dtype, options }) => {
  let folder = '';
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'pcomp-interop-'));
    const recipe = quantizeRecipe({ ...options, calibration: [text], samples: 8, sequenceLength: 256 }, 2);
    await quantize(base, join(folder, 'out'), recipe, { overwrite: false, resume: false, dryRun: false });
  });
  afterAll(() => rm(folder, { recursive: true, force: true }));

  it(`loads in transformers.js as dtype ${dtype} and continues a prompt with onnxruntime's own greedy tokens`, async () => {
    const path = join(folder, 'out');
    const model = await AutoModelForCausalLM.from_pretrained(path, { dtype, local_files_only: true });
    const theirTokenizer = await AutoTokenizer.from_pretrained(path, { local_files_only: true });
    const inputs = theirTokenizer(PROMPT);
    const output = (await model.generate({ ...inputs, max_new_tokens: 32, do_sample: false })) as Tensor;
    const theirs = Array.from(output.data as BigInt64Array, Number);

    await using source = await openModelSource(path);
    await using engine = await createEngine();
    const tokenizer = await loadTokenizer(path, source.model.shape.vocabSize);
    const prompt = tokenizer.encode(PROMPT);
    const ours = await generate(engine, source.model, source.onnxPath!, prompt, { maxNewTokens: 32, endToken: 2 });

    expect(theirs.slice(0, prompt.length)).toEqual([...prompt]);
    const continued = theirs.slice(prompt.length).filter((token) => token !== 2);
    expect(continued.length).toBeGreaterThan(4);
    expect(continued).toEqual(ours);
    await model.dispose();
  });
});
