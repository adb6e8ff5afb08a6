/** Vitest's global set-up: builds, unchecked, the program that end-to-end tests run, where it is older than its source. */
import { execFileSync } from 'node:child_process';
import { readdirSync, statSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const PROJECT = join(ROOT, 'tsconfig.build.json');

export default function build(): void {
  const built = statSync(join(ROOT, 'dist/cli/pcomp.js'), { throwIfNoEntry: false });
  if (built && newest() <= built.mtimeMs) return;
  execFileSync(process.execPath, [createRequire(import.meta.url).resolve('typescript/bin/tsc'), '-p', PROJECT, '--noCheck'], {
    stdio: 'inherit',
  });
}

/** When the youngest file of the program was changed. */
function newest(): number {
  const sources = ['src', 'cli', 'formats'].flatMap((folder) =>
    readdirSync(join(ROOT, folder), { recursive: true, encoding: 'utf8' }).map((name) => join(ROOT, folder, name)),
  );
  return Math.max(...[PROJECT, ...sources].map((path) => statSync(path).mtimeMs));
}
