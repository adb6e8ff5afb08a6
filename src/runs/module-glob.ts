/** Globs on module names: `*` is any run of characters (dots too), `?` one character, `[ab]` a set. */
import { RecipeError } from '../errors.ts';

function toRegExp(glob: string): RegExp {
  const source = glob.replace(/\[!?[^\]]+\]|[\\^$.|+(){}[\]*?]/g, (part) => {
    if (part === '*') return '.*';
    if (part === '?') return '.';
    if (part.length > 1) return part.replace(/^\[!/, '[^').replaceAll('\\', '\\\\');
    return `\\${part}`;
  });
  return new RegExp(`^${source}$`);
}

/**
 * Names matched by any of the globs. A glob matches a module itself or a module it is a whole-name prefix of
 * (`model.layers.0` selects everything below it). A glob that matches nothing is a RecipeError naming the flag.
 */
export function matchModules(flag: string, globs: readonly string[], names: readonly string[]): Set<string> {
  const matched = new Set<string>();
  for (const glob of globs) {
    const pattern = toRegExp(glob);
    const hits = names.filter((name) => pattern.test(name) || prefixes(name).some((prefix) => pattern.test(prefix)));
    if (hits.length === 0) {
      throw new RecipeError(`${flag} ${glob}: matches none of the ${names.length} modules, which are named like ${names[0]}`);
    }
    for (const name of hits) matched.add(name);
  }
  return matched;
}

function prefixes(name: string): string[] {
  const parts = name.split('.');
  return parts.slice(1).map((_, i) => parts.slice(0, i + 1).join('.'));
}
