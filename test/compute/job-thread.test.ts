/** Threads that do jobs: what comes back when they fail. */
import { afterAll, expect, it } from 'vitest';
import { startJobThread } from '../../src/compute/job-thread.ts';

const start = () => startJobThread<string, string>(import.meta.url, 'failing-worker');
const thread = start();
afterAll(() => thread[Symbol.asyncDispose]());

it('a job fails as it failed in the thread, which goes on', async () => {
  await expect(thread.run('format')).rejects.toMatchObject({
    name: 'FormatError',
    message: 'a.bin: ends at byte 3 [too-short]',
    path: 'a.bin',
    rule: 'too-short',
  });
  await expect(thread.run('disk')).rejects.toMatchObject({
    name: 'EnvironmentError',
    code: 'DISK_FULL',
    message: 'a.bin: no space',
  });
  await expect(thread.run('budget')).rejects.toMatchObject({ name: 'RecipeError' });
  await expect(thread.run('training')).rejects.toMatchObject({ name: 'TrainingError', message: 'not finite' });
  await expect(thread.run('bug')).rejects.toMatchObject({
    name: 'TypeError',
    message: 'unforeseen',
    code: 'EBUG',
    stack: expect.stringMatching(/failing-worker\.ts/),
  });
  expect(await thread.run('anything')).toBe('did anything');
});

it('a job fails when the thread ends, and so does every later one', async () => {
  await using ending = start();
  await expect(ending.run('exit')).rejects.toThrow('the thread of failing-worker ended with code 3');
  await expect(ending.run('anything')).rejects.toThrow('the thread of failing-worker ended with code 3');
});

it('what fails between jobs is told by the next', async () => {
  await using failing = start();
  expect(await failing.run('later')).toBe('did later');
  const untilItFails = async () => {
    for (;;) await failing.run('anything').then(() => new Promise((resolve) => setTimeout(resolve, 10)));
  };
  await expect(untilItFails()).rejects.toMatchObject({
    message: 'nobody waits for this',
    stack: expect.stringMatching(/failing-worker\.ts/),
  });
});

it('a job tells what it does in order, and hears that it is to stop', async () => {
  await using talking = startJobThread<string, string, number>(import.meta.url, 'failing-worker');
  const told: number[] = [];
  expect(await talking.run('count', { onEvent: (event) => told.push(event) })).toBe('did count');
  expect(told).toEqual([1, 2, 3]);

  const abort = new AbortController();
  const waiting = talking.run('wait', { onEvent: () => abort.abort(), signal: abort.signal });
  await expect(waiting).rejects.toMatchObject({ name: 'AbortError', message: 'This operation was aborted' });
  await expect(talking.run('wait', { signal: abort.signal })).rejects.toThrow('This operation was aborted');
  expect(await talking.run('anything')).toBe('did anything');
});
