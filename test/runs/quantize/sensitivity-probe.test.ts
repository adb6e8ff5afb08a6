/** How many tokens errors are followed on. */
import { expect, it } from 'vitest';
import { probedTokens } from '../../../src/runs/quantize/sensitivity-probe.ts';

it.each([
  [1, 2048],
  [12, 2048],
  [24, 1024],
  [32, 768],
  [80, 768],
])('%i blocks: %i', (blocks, tokens) => {
  expect(probedTokens(blocks)).toBe(tokens);
});

it('makes the work of following grow no faster than the depth, up to 32 blocks', () => {
  for (let blocks = 12; blocks <= 32; blocks++) expect(probedTokens(blocks) * blocks).toBeLessThanOrEqual(2048 * 12);
});
