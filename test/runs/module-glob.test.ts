import { describe, expect, it } from 'vitest';
import { matchModules } from '../../src/runs/module-glob.ts';

const NAMES = [
  'model.layers.0.self_attn.q_proj',
  'model.layers.0.mlp.down_proj',
  'model.layers.1.mlp.down_proj',
  'model.layers.10.mlp.up_proj',
];
const match = (...globs: string[]) => [...matchModules('--skip', globs, NAMES)];

describe('module globs', () => {
  it('match a whole name, with * crossing dots', () => {
    expect(match('*.down_proj')).toEqual([NAMES[1], NAMES[2]]);
    expect(match('model.layers.*.mlp.*')).toEqual(NAMES.slice(1));
  });

  it('match everything below a module they name', () => {
    expect(match('model.layers.1')).toEqual([NAMES[2]]);
    expect(match('model.layers.?')).toEqual(NAMES.slice(0, 3));
  });

  it('know sets, and take a dot literally', () => {
    expect(match('model.layers.[1-9].mlp.down_proj')).toEqual([NAMES[2]]);
    expect(match('model.layers.[!0].mlp.down_proj')).toEqual([NAMES[2]]);
    expect(() => match('modelxlayers*')).toThrow('--skip modelxlayers*: matches none of the 4 modules');
  });

  it('refuse a pattern that matches nothing even beside one that does', () => {
    expect(() => match('*.down_proj', 'lm_head')).toThrow('--skip lm_head');
  });
});
