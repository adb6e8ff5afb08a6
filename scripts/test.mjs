/** The whole check: lint, types, unused code, docs, then every test. Prints `N passed, N failed, N skipped` last. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const scratch = mkdtempSync(join(tmpdir(), 'pcomp-test-'));
const env = { ...process.env, ONNXRUNTIME_NODE_INSTALL: 'skip' };

const bin = (name) => join(root, 'node_modules', '.bin', name);
function run(title, command, args, cwd = root) {
  console.log(`\n== ${title}`);
  const { status, error } = spawnSync(command, args, {
    cwd,
    env,
    stdio: ['ignore', 'inherit', 'inherit'],
    shell: process.platform === 'win32',
  });
  if (error) throw error;
  return status === 0;
}

const checks = [
  ['lint', bin('biome'), ['check', '--error-on-warnings', '.']],
  ['types', bin('tsc'), ['--noEmit']],
  ['build', bin('tsc'), ['-p', 'tsconfig.build.json']],
  ['unused files, exports and dependencies', bin('knip'), []],
  ['package', bin('publint'), []],
  ['documentation comments', bin('typedoc'), ['--emit', 'none', '--treatWarningsAsErrors']],
];
const failedChecks = checks.filter((check) => !run(...check)).map(([title]) => title);

let totals = { passed: 0, failed: 0, skipped: 0 };
/** Runs one vitest project and adds its counts; a crash without a report counts as a failure. */
function test(title, args, cwd) {
  const file = join(scratch, `${title}.json`);
  const ok = run(
    title,
    bin('vitest'),
    ['run', ...args, '--reporter=default', '--reporter=json', `--outputFile.json=${file}`],
    cwd,
  );
  if (!existsSync(file)) {
    totals.failed++;
    return;
  }
  const report = JSON.parse(readFileSync(file, 'utf8'));
  totals.passed += report.numPassedTests;
  totals.failed += report.numFailedTests + (ok || report.numFailedTests > 0 ? 0 : 1);
  totals.skipped += report.numPendingTests + report.numTodoTests;
}
test('tests', []);
// The untouched client library is a package of its own, so that users do not pay for it.
if (existsSync(join(root, 'test/interop/node_modules'))) test('interop', ['--config', 'test/interop/vitest.config.ts']);
else
  console.log(
    '\n== interop\nskipped: test/interop is not installed (npm ci --prefix test/interop --ignore-scripts); continuous integration runs it',
  );

rmSync(scratch, { recursive: true, force: true });
totals = { ...totals, passed: totals.passed + checks.length - failedChecks.length, failed: totals.failed + failedChecks.length };
for (const title of failedChecks) console.log(`failed: ${title}`);
console.log(`${totals.passed} passed, ${totals.failed} failed, ${totals.skipped} skipped`);
process.exit(totals.failed === 0 ? 0 : 1);
