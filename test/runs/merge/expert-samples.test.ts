/** Calibration files of learned merges: what of each line counts. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { ChatTemplate } from '../../../src/calibration/chat-template.ts';
import { loadTokenizer, type Tokenizer } from '../../../src/calibration/tokenizer.ts';
import { readSamples, type SampleOptions } from '../../../src/runs/merge/experts/samples.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';

const scratch = scratchFolder();
const TEMPLATE =
  "<s>{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}";
let tokenizer: Tokenizer;
let template: ChatTemplate;
beforeAll(async () => {
  tokenizer = await loadTokenizer(fileURLToPath(new URL('../../../fixtures/lab/base', import.meta.url)), 2048);
  template = await ChatTemplate.parse('template', TEMPLATE);
});

async function read(lines: readonly unknown[], options: Partial<SampleOptions> = {}, own = tokenizer) {
  const path = join(scratch.path, 'lines.jsonl');
  writeFileSync(path, lines.map((line) => `${JSON.stringify(line)}\n`).join(''));
  const given = { calibration: [path], labels: ['a'], count: 8, sequenceLength: 64, seed: 0, holdOut: false };
  return readSamples(own, { ...given, templateOf: async () => template, ...options });
}

/** The text of the tokens that are predicted by rows that count. */
const counted = ({ tokens, countedFrom }: { tokens: Int32Array; countedFrom: number }) =>
  tokenizer.decode(tokens.subarray(countedFrom + 1));
const talk = [
  { role: 'user', content: 'Who are you?' },
  { role: 'assistant', content: 'A friend.' },
];

describe('what counts of a line', () => {
  it('the response to a prompt', async () => {
    const { training, plain } = await read([{ prompt: 'def add(a, b):', response: '\n    return a + b' }]);
    expect(training.map(counted)).toEqual(['\n    return a + b']);
    expect(training[0].open).toBeUndefined();
    expect(plain).toBe(true);
  });

  it('what the assistant says last, and what the template writes after it', async () => {
    const { training, plain } = await read([{ messages: [...talk, talk[0], { role: 'assistant', content: 'Still a friend.' }] }]);
    // The space before it is one token with its first word.
    expect(training.map(counted)).toEqual([' Still a friend.\n']);
    expect(plain).toBe(false);
  });

  it('nothing yet of a prompt that its expert is to answer; all of it where nobody is', async () => {
    const lines = [{ prompt: 'def add(a, b):' }, { messages: talk.slice(0, 1) }];
    const open = await read(lines, { answers: true });
    expect(open.training.map((sample) => sample.open)).toEqual([true, true]);
    expect(tokenizer.decode(open.training[1].tokens)).toBe('[user] Who are you?\n[assistant] ');
    const closed = await read(lines);
    expect(closed.training.map((sample) => [sample.open, sample.countedFrom])).toEqual([
      [undefined, 0],
      [undefined, 0],
    ]);
  });
});

describe('a line that cannot be a sample', () => {
  it('a prompt that leaves no room is left out and counted', async () => {
    const long = { prompt: 'word '.repeat(80) };
    const { training, notes } = await read([long, { prompt: 'short' }], { answers: true });
    expect(training).toHaveLength(1);
    expect(notes.join()).toMatch(/a: 1 prompts of 64 tokens or more leave no room for a response; left out/);
    await expect(read([long], { answers: true })).rejects.toThrow(
      /no text for expert a in it, but for 1 prompts of 64 tokens or more/,
    );
  });

  it('a prompt of no tokens is left out and counted: there is nothing to go on from', async () => {
    const empty = { prompt: '' };
    // The fixture's own begins every text with a token.
    const bare = { encode: (text: string) => tokenizer.encode(text, 'none') } as Tokenizer;
    for (const answers of [true, false]) {
      const { training, notes } = await read([empty, { prompt: 'short' }, empty], { answers }, bare);
      expect(training).toHaveLength(1);
      expect(notes.join()).toMatch(/a: 2 prompts without a token, of which nothing follows; left out/);
    }
    await expect(read([empty], {}, bare)).rejects.toThrow(/no text for expert a in it, but for 1 prompts without a token/);
    const answered = await read([{ prompt: '', response: 'A friend.' }], {}, bare);
    expect(answered.training.map((sample) => tokenizer.decode(sample.tokens))).toEqual(['A friend.']);
  });

  it('a template is read once for all conversations of a file', async () => {
    let reads = 0;
    const templateOf = async () => {
      reads++;
      return template;
    };
    const { training } = await read([{ messages: talk }, { messages: talk }], { templateOf });
    expect(training).toHaveLength(2);
    expect(reads).toBe(1);
  });

  it.each([
    [{ messages: [] }, {}, /line 1: "messages" is not a list of \{role, content\}, both texts/],
    [{ messages: [{ role: 'user' }] }, {}, /line 1: "messages" is not a list/],
    [{ messages: talk }, { templateOf: async () => undefined }, /holds messages, and neither a nor the base has a chat template/],
  ])('%j', async (line, options, message) => {
    await expect(read([line], options)).rejects.toThrow(message);
  });
});
