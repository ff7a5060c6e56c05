//! The plan of the house: no circles of files, and no file that is too long to read.
//!
//! A file depends on another if it names something that is *defined* there: in a `use`, or by a path
//! that begins with `crate::` or `super::`. Names are followed through re-exports to the file that
//! defines them, so that a `mod.rs` which only re-exports is a map and no room: neither `pub use` nor
//! `mod` counts, and naming something by way of a map counts for the room behind it. Tests inside a
//! file (`#[cfg(test)] mod tests`), comments and strings do not count.
//!
//! The rows of the member's transition table (`member/`) are `impl Member` in several files, which is
//! a circle by construction. They are one room here, and what is in it is not looked at.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// Most lines of a file.
const LINES_MOST: usize = 650;
/// Files that are still longer than that. They may only get shorter.
const LONG: [(&str, usize); 4] = [
    ("member/machine", 690),
    ("output/outlet", 765),
    ("roles/primary", 765),
    ("roles/secondary", 770),
];

/// Where the files of a path from `crate` are.
type Module = Vec<String>;

struct House {
    /// Sources without comments, strings and tests.
    files: BTreeMap<Module, String>,
    /// What a file re-exports, by its name there.
    exported: BTreeMap<(Module, String), Module>,
}

impl House {
    fn open() -> Self {
        let mut files = BTreeMap::new();
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        read(&src, &mut Vec::new(), &mut files);
        let mut house = Self {
            exported: BTreeMap::new(),
            files: files.iter().map(|(m, t)| (m.clone(), bare(t))).collect(),
        };
        for (module, text) in &house.files {
            for (public, path) in uses(text).1 {
                if let (true, Some(name)) = (public, path.last().cloned()) {
                    let full = house.absolute(module, &path);
                    house
                        .exported
                        .extend(full.map(|f| ((module.clone(), name), f)));
                }
            }
        }
        house
    }

    /// A path from the root of the crate; `None` if it leads to another crate.
    fn absolute(&self, module: &[String], path: &[String]) -> Option<Module> {
        let (mut at, mut rest) = (module.to_vec(), path);
        match rest.first()?.as_str() {
            "crate" => (at, rest) = (Vec::new(), &rest[1..]),
            "self" => rest = &rest[1..],
            "super" => {
                while rest.first().is_some_and(|s| s == "super") {
                    at.pop();
                    rest = &rest[1..];
                }
            }
            child => {
                at.push(child.into());
                if !self.files.contains_key(&at) {
                    return None;
                }
                at.pop();
            }
        }
        at.extend_from_slice(rest);
        Some(at)
    }

    /// The file that defines what a path names, and what is left of the path in it.
    fn resolve<'p>(&self, path: &'p [String]) -> (Module, &'p [String]) {
        let mut at = Vec::new();
        for (n, name) in path.iter().enumerate() {
            at.push(name.clone());
            if self.files.contains_key(&at) {
                continue;
            }
            at.pop();
            if let Some(behind) = self.exported.get(&(at.clone(), name.clone())) {
                return (self.resolve(behind).0, &path[n..]);
            }
            return (at, &path[n..]);
        }
        (at, &[])
    }

    /// The files that this one names something of.
    fn named(&self, module: &Module) -> BTreeSet<Module> {
        let (rest, used) = uses(&self.files[module]);
        let mut paths: Vec<_> = used
            .into_iter()
            .filter_map(|(public, path)| (!public).then_some(path))
            .collect();
        for root in ["crate::", "super::"] {
            for (at, _) in rest.match_indices(root) {
                let end = rest[at..].find(|c: char| !(c.is_alphanumeric() || "_:".contains(c)));
                let path = &rest[at..at + end.unwrap_or(rest.len() - at)];
                paths.push(
                    path.trim_end_matches(':')
                        .split("::")
                        .map(String::from)
                        .collect(),
                );
            }
        }
        let mut named = BTreeSet::new();
        for path in paths {
            let Some(mut full) = self.absolute(module, &path) else {
                continue;
            };
            if full.last().is_some_and(|last| last == "self") {
                full.pop();
            }
            let (file, left) = self.resolve(&full);
            if !left.is_empty() {
                named.insert(file);
                continue;
            }
            // A module was brought in by name: what is named in it counts.
            let Some(prefix) = full.last().map(|last| format!("{last}::")) else {
                continue;
            };
            for (at, _) in rest.match_indices(&prefix) {
                let name = &rest[at + prefix.len()..];
                let end = name.find(|c: char| !(c.is_alphanumeric() || c == '_'));
                let mut inside = full.clone();
                inside.push(name[..end.unwrap_or(name.len())].into());
                named.insert(self.resolve(&inside).0);
            }
        }
        named.remove(module);
        named
    }
}

fn read(dir: &Path, module: &mut Module, into: &mut BTreeMap<Module, String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            module.push(stem);
            read(&path, module, into);
            module.pop();
        } else if path.extension().is_some_and(|e| e == "rs") {
            let mut name = module.clone();
            if !matches!(stem.as_str(), "mod" | "lib") {
                name.push(stem);
            }
            into.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
}

/// The text without tests, comments and what stands in strings.
fn bare(text: &str) -> String {
    let tests = text.find("\n#[cfg(test)]\nmod tests {");
    let code = &text[..tests.unwrap_or(text.len())];
    let mut bare = String::new();
    for line in code.lines() {
        let mut quoted = false;
        let mut chars = line.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '\\' if quoted => {
                    chars.next();
                }
                '"' => quoted = !quoted,
                '/' if !quoted && chars.peek() == Some(&'/') => break,
                c if !quoted => bare.push(c),
                _ => {}
            }
        }
        bare.push('\n');
    }
    bare
}

/// The text without its `use` items, and what those name; `true` for a re-export.
fn uses(text: &str) -> (String, Vec<(bool, Module)>) {
    let (mut rest, mut paths) = (String::new(), Vec::new());
    for item in text.split_inclusive(';') {
        let at = item.rfind("use ").filter(|at| {
            let line = item[..*at].rsplit('\n').next().unwrap_or_default().trim();
            line.is_empty() || line.starts_with("pub")
        });
        let Some(at) = at else {
            rest.push_str(item);
            continue;
        };
        rest.push_str(&item[..at]);
        let public = rest.trim_end().ends_with("pub") || rest.trim_end().ends_with("pub(crate)");
        let public = public || rest.trim_end().ends_with("pub(super)");
        expand(item[at + 4..].trim_end_matches(';'), &[], &mut |path| {
            paths.push((public, path));
        });
    }
    (rest, paths)
}

/// Each path of a `use` tree.
fn expand(tree: &str, before: &[String], each: &mut impl FnMut(Module)) {
    let tree = tree.trim();
    let Some((prefix, inner)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default();
        let names = path.split("::").map(|name| name.trim().to_owned());
        return each(before.iter().cloned().chain(names).collect());
    };
    let mut before = before.to_vec();
    let names = prefix.split("::").map(str::trim).filter(|n| !n.is_empty());
    before.extend(names.map(String::from));
    let (mut depth, mut from) = (0, 0);
    let inner = &inner[..inner.rfind('}').unwrap_or(inner.len())];
    for (at, c) in inner.char_indices().chain([(inner.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !inner[from..at].trim().is_empty() {
                    expand(&inner[from..at], &before, each);
                }
                from = (at + 1).min(inner.len());
            }
            _ => {}
        }
    }
}

/// The room that a file belongs to.
fn room(module: &Module) -> Module {
    if module.first().is_some_and(|first| first == "member") {
        return vec!["member".into()];
    }
    module.clone()
}

#[test]
fn no_file_depends_on_itself_by_way_of_others() {
    let house = House::open();
    let mut edges: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
    for module in house.files.keys() {
        let named = house.named(module);
        let named = named.iter().map(room).filter(|to| *to != room(module));
        edges.entry(room(module)).or_default().extend(named);
    }
    let total: usize = edges.values().map(BTreeSet::len).sum();
    assert!(total > 200, "only {total} dependencies were understood");
    // Who names nothing that is left is taken away, until nobody is left or only circles are.
    loop {
        let left: BTreeSet<_> = edges.keys().cloned().collect();
        let before = edges.len();
        edges.retain(|_, named| named.iter().any(|n| left.contains(n)));
        if edges.len() == before {
            break;
        }
    }
    let circles: Vec<_> = edges
        .iter()
        .map(|(m, named)| {
            let inside = named.iter().filter(|n| edges.contains_key(*n));
            let inside: Vec<_> = inside.map(|n| n.join("/")).collect();
            format!("{} -> {}", m.join("/"), inside.join(", "))
        })
        .collect();
    assert!(
        circles.is_empty(),
        "in or before a circle:\n{}",
        circles.join("\n")
    );
}

#[test]
fn names_are_followed_to_the_file_that_defines_them() {
    let house = House::open();
    let module = |path: &str| path.split('/').map(String::from).collect::<Vec<_>>();
    let named = house.named(&module("roles/primary"));
    for there in [
        "output/outlet",
        "epoch/sender",
        "pairing/accept",
        "operator",
    ] {
        assert!(named.contains(&module(there)), "{there} of {named:?}");
    }
    assert!(!named.contains(&module("output")), "a map is no room");
}

#[test]
fn no_file_is_too_long_to_read() {
    let mut files = BTreeMap::new();
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    read(&src, &mut Vec::new(), &mut files);
    let long: Vec<_> = files
        .iter()
        .map(|(module, text)| (module.join("/"), text.lines().count()))
        .filter(|(file, lines)| {
            let known = LONG.iter().find(|(long, _)| long == file);
            *lines > known.map_or(LINES_MOST, |(_, most)| *most)
        })
        .collect();
    assert!(long.is_empty(), "over {LINES_MOST} lines: {long:?}");
}
