import { describe, expect, it } from 'vitest';
import { parse as parseYaml } from 'yaml';
import { parseMergekitConfig } from '../../../src/runs/merge/mergekit/config.ts';
import { mergekitValueAt } from '../../../src/runs/merge/mergekit/values.ts';

const parse = (text: string) => parseMergekitConfig('--config m.yml', parseYaml(text), text);

describe('a value in a mergekit file', () => {
  it('runs linearly through its points from the first layer to the last', () => {
    expect([0, 0.25, 0.5, 0.75, 1].map((t) => mergekitValueAt([0, 1], 'x', t))).toEqual([0, 0.25, 0.5, 0.75, 1]);
    expect(mergekitValueAt([0, 0.5, 0.3], 'x', 0.75)).toBeCloseTo(0.4, 12);
    expect(mergekitValueAt([0.2, 0.5, 0.3], 'x', 1)).toBe(0.3);
  });

  it('is the one of the first filter that is part of the name', () => {
    const value = [
      { filter: 'mlp', value: 1 },
      { filter: 'self_attn', value: [0, 1] },
      { filter: '*', value: 7 },
    ];
    expect(mergekitValueAt(value, 'model.layers.0.mlp.up_proj.weight', 0.5)).toBe(1);
    expect(mergekitValueAt(value, 'model.layers.0.self_attn.q_proj.weight', 0.5)).toBe(0.5);
    expect(mergekitValueAt(value, 'model.norm.weight', 0.5)).toBe(7);
    expect(mergekitValueAt(value.slice(0, 2), 'model.norm.weight', 0.5)).toBeUndefined();
  });

  it('is taken from the point before where points are not numbers', () => {
    expect(mergekitValueAt(['max', 'sum', 'max'], 'x', 0.6)).toBe('sum');
  });
});

describe('a mergekit file', () => {
  it('with models is one slice of all layers', () => {
    const { slices, method, dtype } = parse(
      'merge_method: dare_ties\nbase_model: b\ndtype: float32\nout_dtype: bfloat16\nmodels: [{model: a}, {model: b}]',
    );
    expect(method).toBe('dare-ties');
    expect(dtype).toBe('bf16');
    expect(slices).toEqual([
      {
        sources: [
          { model: 'a', parameters: {} },
          { model: 'b', parameters: {} },
        ],
        parameters: {},
      },
    ]);
  });

  it('with modules has one, whose parameters come before those of the file', () => {
    const { slices, module, parameters } = parse(
      'merge_method: ties\nbase_model: b\nparameters: {density: 0.5}\nmodules: {default: {models: [{model: a}], parameters: {density: 0.2}}}',
    );
    expect(slices).toEqual([{ sources: [{ model: 'a', parameters: {} }], parameters: {} }]);
    expect([parameters, module]).toEqual([{ density: 0.5 }, { density: 0.2 }]);
  });

  it.each([
    ['merge_method: ties\nmodels: [{model: a}]\nslices: []', /exactly one of models, slices and modules/],
    ['merge_method: ties', /exactly one of models, slices and modules/],
    ['merge_method: nonsense\nmodels: [{model: a}]', /--method nonsense: must be one of/],
    [
      'merge_method: linear\nmodels: [{model: a}]\nchat_template: alpaca',
      /chat_template alpaca: mergekit's own templates are not here/,
    ],
    ['merge_method: linear\nmodules: {vision: {models: [{model: a}]}}', /modules: vision: pcomp follows default here/],
    [
      'merge_method: linear\nmodules: {default: {models: [{model: a}], slices: []}}',
      /modules\.default: exactly one of models and slices/,
    ],
    [
      'merge_method: linear\nmodules: {default: {models: [{model: a}]}}\nmodels: [{model: a}]',
      /exactly one of models, slices and modules/,
    ],
    ['merge_method: linear\nmodels: [{model: a, weight: 1}]', /models\[0\]: weight: pcomp follows/],
    ['merge_method: linear\nmodels: [{model: a+lora}]', /a\+lora: model\+adapter is not taken/],
    ['merge_method: linear\nmodels: [{model: a}]\ndtype: int8', /dtype "int8": must be one of/],
    ['merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: union\ntokenizer: {source: base}', /keep one of them/],
    [
      'merge_method: linear\nmodels: [{model: a}]\ntokenizer: {vocabulary: {}}',
      /tokenizer: vocabulary: pcomp follows source, tokens, pad_to/,
    ],
    ['merge_method: linear\nmodels: [{model: a}]\ntokenizer: {pad_to_multiple_of: 0}', /pad_to_multiple_of 0: a whole number/],
    ['merge_method: linear\nmodels: [{model: a, parameters: {weight: []}}]', /parameters\.weight: a number/],
    ['merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: x}]}}]', /weight\[0\]: \{filter, value\}/],
    ['merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 2]}]}]', /layer_range \[3,2\]/],
    [
      'merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]',
      /equally long; they are 2 and 3/,
    ],
    ['- 1', /a mapping is expected/],
  ])('is refused by what is wrong with it: %s', (text, message) => {
    expect(() => parse(text)).toThrow(message);
  });
});
