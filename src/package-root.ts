/** Where the package lives, whether it runs from source (src/) or as published (dist/src/), and which version it is. */
import { existsSync, readFileSync } from 'node:fs';

/** URL of the folder that holds package.json and assets/, with a trailing slash. */
export function packageRoot(): URL {
  let folder = new URL('./', import.meta.url);
  while (!existsSync(new URL('package.json', folder))) {
    const parent = new URL('../', folder);
    if (parent.href === folder.href) throw new Error(`no package.json above ${import.meta.url}`);
    folder = parent;
  }
  return folder;
}

/** The version in package.json. */
export function packageVersion(): string {
  return (JSON.parse(readFileSync(new URL('package.json', packageRoot()), 'utf8')) as { version: string }).version;
}
