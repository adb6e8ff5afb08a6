/** Vitest's global set-up: brings the program that end-to-end tests run up to its source. Types are checked elsewhere. */
import { mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));

export default function build(): void {
  const { config } = ts.readConfigFile(join(ROOT, 'tsconfig.build.json'), ts.sys.readFile);
  const { fileNames, options } = ts.parseJsonConfigFileContent(config, ts.sys, ROOT);
  // One file at a time, nothing tells that they are modules.
  const compilerOptions = { ...options, module: ts.ModuleKind.ESNext };
  for (const source of fileNames) {
    const built = join(ROOT, 'dist', relative(ROOT, source).replace(/\.ts$/, '.js'));
    if (changed(source) <= changed(built)) continue;
    mkdirSync(dirname(built), { recursive: true });
    writeFileSync(built, ts.transpileModule(readFileSync(source, 'utf8'), { compilerOptions, fileName: source }).outputText);
  }
}

/** When a file was; 0: never, for it is not there. */
function changed(path: string): number {
  return statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;
}
