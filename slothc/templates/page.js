const table=document.getElementById('models'),bodies=[...table.tBodies],search=document.getElementById('search'),states=new Set();
const text=new Map();
const textOf=b=>{if(!text.has(b))text.set(b,b.textContent.toLowerCase());return text.get(b)};
function filter(){
  const words=search.value.toLowerCase().split(/\s+/).filter(Boolean);let n=0;
  for(const b of bodies){
    const mine=b.dataset.states.split(' ');
    b.hidden=!((!states.size||mine.some(s=>states.has(s)))&&words.every(w=>textOf(b).includes(w)));n+=!b.hidden}
  document.getElementById('shown').textContent=n+' of '+bodies.length}
search.addEventListener('input',filter);
for(const chip of document.querySelectorAll('button.chip'))chip.addEventListener('click',()=>{
  const s=chip.dataset.state,on=!states.has(s);on?states.add(s):states.delete(s);
  chip.classList.toggle('on',on);chip.setAttribute('aria-pressed',on);filter()});
const heads=[...table.tHead.rows[0].cells];
heads.forEach((head,k)=>head.firstChild.addEventListener('click',()=>{
  const down=head.getAttribute('aria-sort')==='ascending';heads.forEach(h=>h.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort',down?'descending':'ascending');
  const key=b=>b.rows[0].cells[k].dataset.key,sign=down?-1:1;
  table.append(...bodies.sort((a,b)=>{const x=key(a),y=key(b);
    if(x===''||y==='')return (x==='')-(y==='');
    return sign*(isNaN(x)||isNaN(y)?x.localeCompare(y):x-y)}))}));
function turn(b,open){b.classList.toggle('open',open);b.rows[0].setAttribute('aria-expanded',b.classList.contains('open'))}
for(const b of bodies){const line=b.rows[0];
  line.addEventListener('click',()=>{if(!String(getSelection()))turn(b)});
  line.addEventListener('keydown',e=>{if(e.key==='Enter'||e.key===' '){e.preventDefault();turn(b)}})}
function go(){const b=document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if(b&&b.rows){b.hidden=false;turn(b,true);b.scrollIntoView()}}
addEventListener('hashchange',go);filter();go();
