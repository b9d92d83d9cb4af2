//! How many workloads policies are for.

use super::*;

#[test]
fn policies_select_members_of_the_mesh_and_nobody_else() {
    let policy = |namespace: &str, name: &str, selector: &str| {
        format!(
            "---\napiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
             spec: {{{selector}action: Deny, rules: [{{}}]}}\n"
        )
    };
    let web = "selector: {matchLabels: {app: web}}, ";
    let more = [
        policy("shop", "s-web", web),
        policy("shop", "s-nobody", "selector: {matchLabels: {app: nobody}}, "),
        policy("shop", "s-all", ""),
        policy("outside", "s-outside", ""),
        policy(ROOT_NAMESPACE, "s-mesh", ""),
        policy(ROOT_NAMESPACE, "s-mesh-web", web),
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: starts, namespace: shop, uid: uid-starts}\nspec: {nodeName: node-a}\n"
            .to_owned(),
    ];
    let (before, after) = (world(&[CLUSTER]), world(&[CLUSTER, &more.concat()]));
    let compiled = |world| compile(world, &CaptureStates::default(), &parameters());
    let (before, after) = (compiled(&before), compiled(&after));
    let count = |name: &str| {
        let mut found = after.selected.iter();
        found.find(|(id, _)| id.name == name).map(|(_, count)| *count)
    };
    let selected = ["s-web", "s-nobody", "s-all", "s-outside", "s-mesh", "s-mesh-web"].map(count);
    // Of `shop`: web, and a Pod that has no address yet; not the one that opted out, the host's, or the one that is done.
    let members = after
        .pods
        .values()
        .filter(|place| place.is_member && place.namespace == "shop")
        .count();
    assert_eq!(selected, [Some(1), Some(0), Some(members), Some(0), Some(members), Some(1)]);
    assert!(members > 1 && !before.selected.keys().any(|id| id.name == "s-web"));
}
