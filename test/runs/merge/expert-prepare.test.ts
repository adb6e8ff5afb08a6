/** What is refused before a learned merge runs any model. */
import { expect, it } from 'vitest';
import { requireTemporarySpace } from '../../../src/runs/merge/experts/prepare.ts';

const cost = { samples: 1, heldOut: 0, prompts: 0, tokens: 1, updates: 1 };

it('temporary files that the disk has no room for, with both numbers and what to do', async () => {
  await expect(requireTemporarySpace({ ...cost, temporaryBytes: 0 })).resolves.toBeUndefined();
  await expect(requireTemporarySpace({ ...cost, temporaryBytes: 2 ** 60 })).rejects.toMatchObject({
    code: 'DISK_FULL',
    message: expect.stringMatching(
      /up to 1152921504606847000 bytes in temporary files, and the disk has \d+ left; raise --max-memory/,
    ),
  });
});
