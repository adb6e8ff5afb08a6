import { describe, expect, it } from 'vitest';
import { RecipeError } from '../../../src/errors.ts';
import { QUANTIZE_DEFAULTS, type QuantizeRequest, quantizeRecipe } from '../../../src/runs/quantize/recipe.ts';

const message = (request: QuantizeRequest): string => {
  try {
    quantizeRecipe(request, 4);
  } catch (error) {
    expect(error).toBeInstanceOf(RecipeError);
    return (error as Error).message;
  }
  throw new Error('the recipe was accepted');
};

describe('a recipe', () => {
  it('has the defaults of the contract where nothing is asked for', () => {
    expect(quantizeRecipe({ bits: 2 }, 4)).toEqual({ ...QUANTIZE_DEFAULTS, bits: 2, threads: 4 });
    expect(QUANTIZE_DEFAULTS).toMatchObject({
      method: 'slim-llm',
      preset: 'best',
      groupSize: 128,
      formats: ['onnx'],
      embeddings: 'float',
      samples: 128,
      sequenceLength: 2048,
      seed: 0,
      device: 'cpu',
      engine: 'ort',
    });
  });

  it('is the same whether its values come as text or as numbers', () => {
    const words = {
      bits: '3',
      groupSize: '64',
      formats: 'onnx,safetensors',
      embeddings: '8',
      samples: '5',
      dampening: '0.05',
      preset: 'paper',
    };
    const values = {
      bits: 3,
      groupSize: 64,
      formats: ['onnx', 'safetensors'],
      embeddings: 8,
      samples: 5,
      dampening: 0.05,
      preset: 'paper',
    };
    expect(quantizeRecipe(words, 1)).toEqual(quantizeRecipe(values, 1));
  });

  it('keeps every format once, in the order asked for', () => {
    expect(quantizeRecipe({ bits: 2, formats: 'safetensors,onnx,safetensors' }, 1).formats).toEqual(['safetensors', 'onnx']);
  });

  it.each([1, 8])('of rtn may ask for %i bits', (bits) => {
    expect(quantizeRecipe({ bits, method: 'rtn' }, 1).bits).toBe(bits);
  });

  it('may spell a default that its method does not read', () => {
    expect(quantizeRecipe({ bits: 2, method: 'rtn', actOrder: false, samples: 128 }, 1).method).toBe('rtn');
  });

  it('may have a plan and a group size when the embeddings are quantized, which no plan covers', () => {
    expect(quantizeRecipe({ plan: 'p.json', groupSize: 64, embeddings: 4 }, 1)).toMatchObject({ groupSize: 64, plan: 'p.json' });
  });
});

it.each<[string, QuantizeRequest]>([
  ['--bits: a budget is required, e.g. --bits 2', {}],
  ['--bits 9: must be within 1..8. To keep a layer as it is, use --skip.', { bits: 9 }],
  ['--bits 0: must be within 1..8. To keep a layer as it is, use --skip.', { bits: '0' }],
  ['--bits 2.5: must be a whole number under preset paper', { bits: 2.5, preset: 'paper' }],
  ['--bits 2.5: must be a whole number with --method gptq', { bits: 2.5, method: 'gptq' }],
  ['--bits 2.5: must be a whole number without allocation', { bits: 2.5, without: 'allocation' }],
  ['--bits, --bpw: one budget at a time; give one of --bits, --bpw, --size, --runtime-memory, --max-loss', { bits: 2, bpw: 3 }],
  ['--bpw: widths are not allocated here, so the budget is a width; use --bits', { bpw: 2.5, without: ['allocation'] }],
  ['--alpha: preset paper does not use it; it goes with --preset best', { bits: 2, preset: 'paper', alpha: 0.5 }],
  [
    '--size: --method gptq does not use it; it goes with rtn, slim-llm, slim-llm-plus, autoround',
    { size: '3MB', method: 'gptq' },
  ],
  [
    '--without frob: must be one of asymmetric, transform, grid, allocation, compensation, polish, bias',
    { bits: 2, without: 'frob' },
  ],
  ['--bits two: a number is expected', { bits: 'two' }],
  ['--bits : a number is expected', { bits: '' }],
  ['--bits null: a number is expected', { bits: null }],
  [
    '--bits 1: slim-llm under preset paper mixes widths N-1, N and N+1, so N is 2..7; for 1 bits use --preset best',
    { bits: 1, preset: 'paper' },
  ],
  [
    '--bits 8: slim-llm under preset paper mixes widths N-1, N and N+1, so N is 2..7; for 8 bits use --preset best',
    { bits: 8, preset: 'paper' },
  ],
  ['--bits 2: the plan says every width; give --bits or --plan', { bits: 2, plan: 'p.json' }],
  ['--group-size 64: the plan says the size of every group; give --group-size or --plan', { groupSize: 64, plan: 'p.json' }],
  ['--plan 7: a text is expected', { plan: 7 }],
  ['--preset other: must be one of best, paper', { bits: 2, preset: 'other' }],
  ['--method frob: must be one of rtn, gptq, slim-llm, slim-llm-plus, autoround', { bits: 2, method: 'frob' }],
  ['--group-size 48: must be one of 32, 64, 128, 256', { bits: 2, groupSize: 48 }],
  ['--format zip: must be one of onnx, safetensors, gptq', { bits: 2, formats: 'zip' }],
  ['--format: at least one of onnx, safetensors, gptq', { bits: 2, formats: [] }],
  [
    '--format safetensors,gptq: both write model.safetensors; take one of them (either may go with onnx)',
    { bits: 2, formats: 'safetensors,gptq' },
  ],
  [
    '--format gptq: the layout has one width per module and slim-llm mixes widths inside a module; use --method gptq, or --format safetensors',
    { bits: 2, formats: 'gptq' },
  ],
  [
    '--embeddings 4: the gptq layout keeps embeddings in float; drop the flag or the format',
    { bits: 4, method: 'gptq', formats: 'gptq', embeddings: 4 },
  ],
  ['--embeddings 5: must be one of 4, 8', { bits: 2, embeddings: 5 }],
  ['--samples 0: must be within 1..1000000', { bits: 2, samples: 0 }],
  ['--samples 1.5: must be a whole number', { bits: 2, samples: 1.5 }],
  ['--sequence-length 1: must be within 2..1048576', { bits: 2, sequenceLength: 1 }],
  ['--seed -1: must be within 0..4294967295', { bits: 2, seed: -1 }],
  ['--dampening 2: must be within 0..1', { bits: 2, dampening: 2 }],
  ['--dampening NaN: a number is expected', { bits: 2, dampening: 'NaN' }],
  ['--lambda-salience -1: must be within 0..1000000', { bits: 2, lambdaSalience: -1 }],
  ['--salience loud: must be one of code, inverse-diag', { bits: 2, salience: 'loud' }],
  ['--device tpu: must be one of cpu, auto, webgpu, cuda, dml, coreml', { bits: 2, device: 'tpu' }],
  ['--engine onnx: must be one of ort, tfjs', { bits: 2, engine: 'onnx' }],
  ['--threads 0: must be within 1..1024', { bits: 2, threads: 0 }],
  ['--max-memory 5: must be within 1048576..9007199254740991', { bits: 2, maxMemory: 5 }],
  ['--act-order yes: true or false is expected', { bits: 2, method: 'gptq', actOrder: 'yes' }],
  ['--skip {"a":1}: a list is expected', { bits: 2, skip: { a: 1 } }],
  ['--only : a text is expected', { bits: 2, only: [''] }],
  ['--act-order: --method slim-llm does not use it; it goes with gptq', { bits: 2, actOrder: true }],
  ['--static-groups: --method rtn does not use it; it goes with gptq', { bits: 2, method: 'rtn', staticGroups: true }],
  [
    '--true-sequential: --method rtn does not use it; it goes with gptq, slim-llm',
    { bits: 2, method: 'rtn', trueSequential: true },
  ],
  ['--symmetric: --method slim-llm does not use it; it goes with rtn, gptq', { bits: 2, symmetric: true }],
  [
    '--salience: --method gptq does not use it; it goes with slim-llm, slim-llm-plus',
    { bits: 2, method: 'gptq', salience: 'inverse-diag' },
  ],
  ['--lambda-salience: --method gptq does not use it; it goes with slim-llm', { bits: 2, method: 'gptq', lambdaSalience: 2 }],
  [
    '--dampening: --method rtn does not use it; it goes with gptq, slim-llm, slim-llm-plus',
    { bits: 2, method: 'rtn', dampening: 0.1 },
  ],
  [
    '--calibration: --method rtn does not use it; it goes with gptq, slim-llm, slim-llm-plus, autoround',
    { bits: 2, method: 'rtn', calibration: ['a.txt'] },
  ],
  [
    '--samples: --method rtn does not use it; it goes with gptq, slim-llm, slim-llm-plus, autoround',
    { bits: 2, method: 'rtn', samples: 3 },
  ],
  [
    '--sequence-length: --method rtn does not use it; it goes with gptq, slim-llm, slim-llm-plus, autoround',
    { bits: 2, method: 'rtn', sequenceLength: 9 },
  ],
])('a recipe is refused with "%s"', (expected, request) => {
  expect(message(request)).toBe(expected);
});

it('an option that does not exist is refused with the list of those that do', () => {
  expect(message({ bits: 2, frob: 1 } as QuantizeRequest)).toMatch(
    /^--frob: no such option of quantize; known: --method .*--group-size/,
  );
});
