/** Chat templates of model folders: rendered as their models were trained, and one clear line for what is not rendered. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { ChatTemplate, loadChatTemplate } from '../../src/calibration/chat-template.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
const CHATML =
  "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
const TALK = [
  { role: 'user', content: 'Hi' },
  { role: 'assistant', content: 'Hello!' },
];

function folder(name: string, files: Readonly<Record<string, unknown>>): string {
  const path = join(scratch.path, name);
  mkdirSync(path);
  for (const [file, value] of Object.entries(files))
    writeFileSync(join(path, file), typeof value === 'string' ? value : JSON.stringify(value));
  return path;
}

describe('the template of a folder', () => {
  it('renders a conversation, open or closed, with the special tokens of the tokenizer', async () => {
    const path = folder('chatml', {
      'tokenizer_config.json': { chat_template: CHATML, bos_token: { content: '<s>' }, eos_token: '</s>' },
    });
    const template = (await loadChatTemplate(path))!;
    expect(template.render(TALK, false)).toBe('<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n');
    expect(template.render(TALK.slice(0, 1), true)).toBe('<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n');
  });

  it('is the file of its own where there is one, and the default of several', async () => {
    const several = {
      chat_template: [
        { name: 'rag', template: 'r' },
        { name: 'default', template: 'd' },
      ],
    };
    expect((await loadChatTemplate(folder('several', { 'tokenizer_config.json': several })))!.render(TALK, false)).toBe('d');
    const own = folder('own', { 'tokenizer_config.json': several, 'chat_template.jinja': 'own' });
    expect((await loadChatTemplate(own))!.render(TALK, false)).toBe('own');
    expect(await loadChatTemplate(folder('none', { 'tokenizer_config.json': {} }))).toBeUndefined();
  });
});

describe('what is not rendered', () => {
  it.each([
    ['{% if %}', /^t: its chat template cannot be followed: /],
    ['{% include "other.jinja" %}', /^t: its chat template (cannot be followed|does not take this conversation)/],
  ])('%s', async (source, message) => {
    const render = async () => (await ChatTemplate.parse('t', source)).render(TALK, false);
    await expect(render()).rejects.toThrow(message);
  });

  it('what the template itself refuses, and what it asks for and nobody gives', async () => {
    const refusing = await ChatTemplate.parse('t', "{{ raise_exception('roles must alternate') }}");
    expect(() => refusing.render(TALK, true)).toThrow(
      't: its chat template does not take this conversation (user, assistant): roles must alternate',
    );
    const dated = await ChatTemplate.parse('t', "{{ strftime_now('%d %b %Y') }}");
    expect(() => dated.render(TALK, true)).toThrow(/^t: its chat template does not take this conversation/);
  });
});
