import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    globalSetup: 'test/support/build.ts',
    exclude: ['test/interop/**'],
    testTimeout: 60_000,
    hookTimeout: 60_000,
    // Native sessions and their threads do not survive worker threads being torn down; processes are clean.
    pool: 'forks',
    maxWorkers: 2,
  },
});
